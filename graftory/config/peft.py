"""The typed configurations of the methods that PEFT trains and runs, with the names that PEFT gives their fields.

A field made with `peft_option` or `peft_field` is one of PEFT's own configuration, under the name that PEFT gives it;
all of them go into `adapter_config.json`. `fixed` holds the rest of what PEFT writes there, with the values that they
have when they are off: another value is a feature that graftory does not do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from graftory.config.base import AdapterConfig, check_rate
from graftory.errors import ConfigError
from graftory.schema import Json, encode

T = TypeVar("T")


def peft_option(key: str, help_text: str, default: T) -> T:
    """A field of PEFT's configuration that is an option of the command line."""
    return field(default=default, metadata={"help": help_text, "peft": key})


def peft_field(key: str, default: T) -> T:
    """A field of PEFT's configuration that people do not set."""
    return field(default=default, metadata={"peft": key})


def _peft_pattern(key: str) -> Any:
    return field(default_factory=dict, metadata={"peft": key})


_PLACES: Mapping[str, Json] = {"exclude_modules": None, "layers_pattern": None, "layers_to_transform": None}
"""Where to sit, as PEFT writes it beside `target_modules`: the tensors say it all."""
_BIAS: Mapping[str, Json] = {"bias": "none"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig(AdapterConfig):
    """A method of PEFT's: its layers compute it, its files hold it."""

    peft_type: ClassVar[str]
    forms: ClassVar[tuple[tuple[str, ...], ...]]
    """The sets of parts that a site may have."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Names of tensors that all sites of an adapter share."""
    fixed: ClassVar[Mapping[str, Json]] = {}
    """What else PEFT writes: the values of fields that are not used."""
    transposes: ClassVar[bool] = False
    """Whether PEFT does it on GPT-2's Conv1D too, and asks for `fan_in_fan_out` there."""
    sits_on: ClassVar[str] = "linear layer"
    """What its targets are."""
    may_be_empty: ClassVar[bool] = False
    """Whether a tensor may hold no number."""
    patterns: ClassVar[tuple[str, ...]] = ()
    """Fields that hold values of single modules, by explicit path."""

    def peft_values(self) -> dict[str, Json]:
        """The fields of PEFT's configuration that say what the adapter is, but for where it sits."""
        return {**self.fixed, **{key: _whole(encode(getattr(self, name))) for name, key in peft_fields(type(self))}}


def peft_fields(kind: type[PeftConfig]) -> list[tuple[str, str]]:
    """The fields that are PEFT's: their names here and there."""
    return [(one.name, one.metadata["peft"]) for one in dataclasses.fields(kind) if "peft" in one.metadata]


def _whole(value: Json) -> Json:
    """Whole numbers without a point, as PEFT's users write them."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _at_least(config: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= least):
            raise ConfigError(f"{name}: got {value}, wanted {least} or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaloraConfig(PeftConfig):
    """AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): W + s B diag(E) A, whose ranks shrink where they matter least."""

    method: ClassVar[str] = "adalora"
    parts: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_E")
    peft_type: ClassVar[str] = "ADALORA"
    forms: ClassVar[tuple[tuple[str, ...], ...]] = (parts,)
    transposes: ClassVar[bool] = True
    may_be_empty: ClassVar[bool] = True
    fixed: ClassVar[Mapping[str, Json]] = {
        **_PLACES,
        **_BIAS,
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "loftq_config": {},
        "lora_bias": False,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "r": 8,
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
    }

    rank: int = peft_option("target_r", "mean rank that is left at the end", 8)
    start_rank: int = peft_option("init_r", "rank of every module at the start", 12)
    alpha: float = peft_option("lora_alpha", "scale: s = alpha / start rank", 8.0)
    dropout: float = peft_option("lora_dropout", "dropout on the input of A while training", 0.0)
    tinit: int = peft_option("tinit", "steps before ranks begin to shrink", 0)
    tfinal: int = peft_option("tfinal", "last steps, in which ranks stay", 0)
    delta_t: int = peft_option("deltaT", "steps between two looks at the ranks", 1)
    beta1: float = peft_option("beta1", "smoothing of the importance", 0.85)
    beta2: float = peft_option("beta2", "smoothing of its uncertainty", 0.85)
    orthogonality: float = peft_option("orth_reg_weight", "factor on |A A' - I| + |B' B - I| in the loss", 0.5)
    total_step: int = peft_field("total_step", 0)
    """Steps of the whole training; filled in by it."""
    rank_pattern: Mapping[str, tuple[bool, ...]] | None = peft_field("rank_pattern", None)
    """Which of the first ranks are left, by `<path>.lora_E`; None before anything was taken away."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "rank", "start_rank", "delta_t")
        _at_least(self, 0, "tinit", "tfinal", "total_step", "orthogonality")
        check_rate("dropout", self.dropout)
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted more than 0 and less than 1")
        if self.rank > self.start_rank:
            raise ConfigError(f"rank: got {self.rank} with the start rank {self.start_rank}, wanted at most that")
        if self.total_step and self.tinit + self.tfinal >= self.total_step:
            raise ConfigError(
                f"tinit and tfinal: got {self.tinit} and {self.tfinal} of {self.total_step} steps, which leaves none "
                "to shrink ranks in; give fewer, or train longer"
            )
        odd = [key for key, kept in (self.rank_pattern or {}).items() if len(kept) != self.start_rank]
        if odd:
            raise ConfigError(f"rank_pattern: {odd[0]!r:.80} does not say of {self.start_rank} ranks which are left")

    def peft_values(self) -> dict[str, Json]:
        """See `PeftConfig`; PEFT takes no 0 for steps that are not known yet."""
        values = PeftConfig.peft_values(self)
        return {**values, "total_step": self.total_step or self.tinit + self.tfinal + 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class _ProductConfig(PeftConfig):
    """What LoHa and LoKr share: updates that are products of more than two factors."""

    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    fixed: ClassVar[Mapping[str, Json]] = {**_PLACES, "init_weights": True, "use_effective_conv2d": False}

    rank: int = peft_option("r", "rank r of each product", 8)
    alpha: float = peft_option("alpha", "scale: s = alpha / rank", 8.0)
    rank_dropout: float = peft_option("rank_dropout", "rows of the update dropped while training", 0.0)
    module_dropout: float = peft_option("module_dropout", "how often a module's update is left out while training", 0.0)
    rank_pattern: Mapping[str, int] = _peft_pattern("rank_pattern")
    """Rank of single modules where it differs from `rank`, by explicit path."""
    alpha_pattern: Mapping[str, float] = _peft_pattern("alpha_pattern")
    """Alpha of single modules where it differs from `alpha`, by explicit path."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "rank")
        for rank in self.rank_pattern.values():
            if rank < 1:
                raise ConfigError(f"rank: got {rank}, wanted 1 or more")
        check_rate("rank_dropout", self.rank_dropout)
        check_rate("module_dropout", self.module_dropout)

    def scale_of(self, path: str) -> float:
        """The factor s at one module."""
        return self.alpha_pattern.get(path, self.alpha) / self.rank_pattern.get(path, self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class LohaConfig(_ProductConfig):
    """LoHa (Hyeon-Woo et al. 2022, arXiv:2108.06098): ΔW = s (A₁ B₁) ⊙ (A₂ B₂), s = alpha / r."""

    method: ClassVar[str] = "loha"
    parts: ClassVar[tuple[str, ...]] = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    peft_type: ClassVar[str] = "LOHA"
    forms: ClassVar[tuple[tuple[str, ...], ...]] = (parts,)

    rank: int = peft_option("r", "rank r of both products; that of the update is up to its square", 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class LokrConfig(_ProductConfig):
    """LoKr (Yeh et al. 2024, arXiv:2309.14859): ΔW = s C ⊗ D, either of them whole or a product of rank r."""

    method: ClassVar[str] = "lokr"
    parts: ClassVar[tuple[str, ...]] = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    peft_type: ClassVar[str] = "LOKR"
    forms: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("lokr_w1", "lokr_w2"),
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2"),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
    )

    rank: int = peft_option("r", "rank r of the second factor, and of the first with --decompose-both", 8)
    decompose_both: bool = peft_option("decompose_both", "make the first factor a product of rank r too", False)
    decompose_factor: int = peft_option("decompose_factor", "largest side of the first factor; -1: any", -1)
    rank_dropout_scale: bool = peft_option("rank_dropout_scale", "scale up the rows that are left", False)

    def __post_init__(self) -> None:
        _ProductConfig.__post_init__(self)
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise ConfigError(f"decompose_factor: got {self.decompose_factor}, wanted -1, or 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class VeraConfig(PeftConfig):
    """VeRA (Kopiczko et al. 2024, arXiv:2310.11454): ΔW = diag(b) B diag(d) A; A and B are random and shared."""

    method: ClassVar[str] = "vera"
    parts: ClassVar[tuple[str, ...]] = ("vera_lambda_b", "vera_lambda_d")
    peft_type: ClassVar[str] = "VERA"
    forms: ClassVar[tuple[tuple[str, ...], ...]] = (parts,)
    shared: ClassVar[tuple[str, ...]] = ("vera_A", "vera_B")
    transposes: ClassVar[bool] = True
    fixed: ClassVar[Mapping[str, Json]] = {
        "layers_pattern": None,
        "layers_to_transform": None,
        **_BIAS,
        "init_weights": True,
        "save_projection": True,
    }

    rank: int = peft_option("r", "rank r of the shared projections", 256)
    dropout: float = peft_option("vera_dropout", "dropout on the input of A while training", 0.0)
    initial_d: float = peft_option("d_initial", "d at the start", 0.1)
    projection_seed: int = peft_option("projection_prng_key", "seed of A and B", 0)

    def __post_init__(self) -> None:
        _at_least(self, 1, "rank")
        _at_least(self, 0, "projection_seed")
        check_rate("dropout", self.dropout)


@dataclass(frozen=True, slots=True, kw_only=True)
class VbloraConfig(PeftConfig):
    """VB-LoRA (Li et al. 2024, arXiv:2405.15179): A and B are put together from one bank of vectors."""

    method: ClassVar[str] = "vblora"
    parts: ClassVar[tuple[str, ...]] = ("vblora_logits_A", "vblora_logits_B")
    peft_type: ClassVar[str] = "VBLORA"
    forms: ClassVar[tuple[tuple[str, ...], ...]] = (parts,)
    shared: ClassVar[tuple[str, ...]] = ("vblora_vector_bank",)
    transposes: ClassVar[bool] = True
    fixed: ClassVar[Mapping[str, Json]] = {**_PLACES, **_BIAS, "save_only_topk_weights": False}

    rank: int = peft_option("r", "rank r of the update", 4)
    vectors: int = peft_option("num_vectors", "vectors in the bank", 256)
    vector_length: int = peft_option("vector_length", "length of each; divides both widths of every module", 64)
    topk: int = peft_option("topk", "vectors that are mixed into one piece of A or B", 2)
    dropout: float = peft_option("vblora_dropout", "dropout on the input of A while training", 0.0)
    bank_bound: float = peft_option("init_vector_bank_bound", "fresh vectors are uniform within this bound", 0.02)
    spread: float = peft_option("init_logits_std", "standard deviation of fresh logits", 0.1)

    def __post_init__(self) -> None:
        _at_least(self, 1, "rank", "vectors", "vector_length", "topk")
        _at_least(self, 0, "bank_bound", "spread")
        check_rate("dropout", self.dropout)
        if self.topk > self.vectors:
            raise ConfigError(f"topk: got {self.topk} of {self.vectors} vectors, wanted at most all")


@dataclass(frozen=True, slots=True, kw_only=True)
class FourierftConfig(PeftConfig):
    """FourierFT (Gao et al. 2024, arXiv:2405.03003): ΔW is the inverse Fourier transform of n coefficients."""

    method: ClassVar[str] = "fourierft"
    parts: ClassVar[tuple[str, ...]] = ("fourierft_spectrum",)
    peft_type: ClassVar[str] = "FOURIERFT"
    patterns: ClassVar[tuple[str, ...]] = ("frequency_pattern",)
    forms: ClassVar[tuple[tuple[str, ...], ...]] = (parts,)
    transposes: ClassVar[bool] = True
    fixed: ClassVar[Mapping[str, Json]] = {**_PLACES, **_BIAS, "init_weights": True}

    frequencies: int = peft_option("n_frequency", "n, the coefficients of each module", 1000)
    scaling: float = peft_option("scaling", "factor on the update", 150.0)
    location_seed: int = peft_option("random_loc_seed", "seed of where the coefficients are", 777)
    frequency_pattern: Mapping[str, int] = _peft_pattern("n_frequency_pattern")
    """Coefficients of single modules where they differ from `frequencies`, by explicit path."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "frequencies")
        _at_least(self, 0, "location_seed")
        if not math.isfinite(self.scaling):
            raise ConfigError(f"scaling: got {self.scaling}, wanted a finite number")


@dataclass(frozen=True, slots=True, kw_only=True)
class OftConfig(PeftConfig):
    """OFT (Qiu et al. 2023, arXiv:2306.07280): W R, R orthogonal in blocks, so that angles between neurons stay."""

    method: ClassVar[str] = "oft"
    parts: ClassVar[tuple[str, ...]] = ("oft_R.weight",)
    peft_type: ClassVar[str] = "OFT"
    forms: ClassVar[tuple[tuple[str, ...], ...]] = (parts,)
    fixed: ClassVar[Mapping[str, Json]] = {**_PLACES, **_BIAS, "init_weights": True, "r": 0, "fan_in_fan_out": False}

    block_size: int = peft_option("oft_block_size", "rows of each block of R; divides the module's inputs", 32)
    module_dropout: float = peft_option("module_dropout", "share of blocks that stay as they are while training", 0.0)
    constrained: bool = peft_option("coft", "keep R near to the identity (COFT)", False)
    eps: float = peft_option("eps", "how near", 6e-5)
    block_share: bool = peft_option("block_share", "one block for all", False)
    neumann: bool = peft_option("use_cayley_neumann", "a series in place of the inverse of Cayley's transform", True)
    neumann_terms: int = peft_option("num_cayley_neumann_terms", "terms of the series", 5)

    def __post_init__(self) -> None:
        _at_least(self, 2, "block_size")
        _at_least(self, 1, "neumann_terms")
        _at_least(self, 0, "eps")
        check_rate("module_dropout", self.module_dropout)


@dataclass(frozen=True, slots=True, kw_only=True)
class HraConfig(PeftConfig):
    """HRA (Yuan et al. 2024, arXiv:2405.17484): W H, H a chain of r Householder reflections."""

    method: ClassVar[str] = "hra"
    parts: ClassVar[tuple[str, ...]] = ("hra_u",)
    peft_type: ClassVar[str] = "HRA"
    forms: ClassVar[tuple[tuple[str, ...], ...]] = (parts,)
    fixed: ClassVar[Mapping[str, Json]] = {**_PLACES, **_BIAS, "init_weights": True}

    rank: int = peft_option("r", "reflections; an even number starts as the base", 8)
    orthogonal: bool = peft_option("apply_GS", "make the reflections orthogonal (Gram-Schmidt)", False)

    def __post_init__(self) -> None:
        _at_least(self, 1, "rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class LnTuningConfig(PeftConfig):
    """LN tuning (Zhao et al. 2024, arXiv:2312.11420): gain and bias of the norms are the adapter's own."""

    method: ClassVar[str] = "ln_tuning"
    parts: ClassVar[tuple[str, ...]] = ("ln_tuning_layers.weight", "ln_tuning_layers.bias")
    peft_type: ClassVar[str] = "LN_TUNING"
    forms: ClassVar[tuple[tuple[str, ...], ...]] = (parts, parts[:1])
    sits_on: ClassVar[str] = "norm"
    fixed: ClassVar[Mapping[str, Json]] = {"exclude_modules": None}


PEFT_CONFIGS: tuple[type[PeftConfig], ...] = (
    AdaloraConfig,
    LokrConfig,
    LohaConfig,
    VeraConfig,
    VbloraConfig,
    FourierftConfig,
    OftConfig,
    HraConfig,
    LnTuningConfig,
)
"""Every method that PEFT trains and runs."""
