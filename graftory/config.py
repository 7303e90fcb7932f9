"""The typed configuration of every adapter method. No torch: listing and `--help` read these too.

A method is a row in three places that share its name: its configuration here, its module in
`graftory/adapters/`, and its section in `docs/methods.md`. `hub train` derives its options from
the fields below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from graftory.config_base import AdapterConfig as AdapterConfig
from graftory.config_base import check_rate as _check_rate
from graftory.config_base import option as option
from graftory.config_peft import PEFT_CONFIGS
from graftory.errors import ConfigError
from graftory.schema import Json, decode, encode


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankConfig(AdapterConfig):
    """What LoRA and DoRA share: a product s B A beside a linear layer, s = alpha/r, or alpha/sqrt(r) (rsLoRA)."""

    rank: int = option("rank r of the update", 8)
    alpha: float = option("scale: s = alpha / rank", 16.0)
    rslora: bool = option("scale by alpha / sqrt(rank) instead (rsLoRA)", False)
    dropout: float = option("dropout on the input of A while training", 0.0)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Rank of single modules where it differs from `rank`, by explicit path."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alpha of single modules where it differs from `alpha`, by explicit path."""

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1:
                raise ConfigError(f"rank: got {rank}, wanted 1 or more")
        _check_rate("dropout", self.dropout)

    def rank_of(self, path: str) -> int:
        """The rank at one module."""
        return self.rank_pattern.get(path, self.rank)

    def scale_of(self, path: str) -> float:
        """The factor s at one module."""
        rank = self.rank_of(path)
        return self.alpha_pattern.get(path, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig(LowRankConfig):
    """LoRA (Hu et al. 2022, arXiv:2106.09685): y = W x + s B A x."""

    method: ClassVar[str] = "lora"
    parts: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class DyloraConfig(LoraConfig):
    """DyLoRA (Valipour et al. 2023, arXiv:2210.07558): a LoRA whose first b ranks work alone, for every b up to r."""

    method: ClassVar[str] = "dylora"
    stored_as: ClassVar[str] = "lora"

    frozen: bool = option("a step that draws b trains row b alone", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoraConfig(LoraConfig):
    """SoRA (Ding et al. 2023, arXiv:2311.11696): a LoRA with a gate for each rank; ranks whose gate falls to 0 go."""

    method: ClassVar[str] = "sora"
    stored_as: ClassVar[str] = "lora"

    sparsity: float = option("λ: a step pulls each gate towards 0 by the learning rate times this", 1.0)

    def __post_init__(self) -> None:
        LoraConfig.__post_init__(self)
        if not (math.isfinite(self.sparsity) and self.sparsity >= 0):
            raise ConfigError(f"sparsity: got {self.sparsity}, wanted a finite number of 0 or more")


Biases = Literal["none", "lora_only", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraBiasConfig(LowRankConfig):
    """LoRA with biases, as PEFT has it: y = W x + b' + s (B A x + c), b' the adapter's own in place of b."""

    method: ClassVar[str] = "lora_bias"
    parts: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "base_layer.bias", "bias")

    lora_bias: bool = option("c, a bias on B, learns too", False)
    bias: Biases = option("whose own bias learns: that of no module, of those with LoRA, or of all", "lora_only")
    biases: tuple[str, ...] = ()
    """The targets whose own bias is replaced. Filled in from the base; explicit paths."""
    bias_only: tuple[str, ...] = ()
    """Those of them that have no LoRA."""

    def __post_init__(self) -> None:
        LowRankConfig.__post_init__(self)
        odd = sorted(set(self.bias_only) - set(self.biases)) or sorted(set(self.biases) - set(self.targets))
        if odd:
            raise ConfigError(f"biases: {odd[0]!r:.80} is not among the targets with a bias; wanted some of them")

    @property
    def linears(self) -> tuple[str, ...]:
        """The targets with LoRA."""
        return tuple(path for path in self.targets if path not in self.bias_only)

    def parts_at(self, path: str) -> tuple[str, ...]:
        """What there is at one target."""
        if path in self.bias_only:
            return self.parts[4:]
        own = self.parts[3:4] if path in self.biases else ()
        return (*self.parts[:2], *(self.parts[2:3] if self.lora_bias else ()), *own)


@dataclass(frozen=True, slots=True, kw_only=True)
class DoraConfig(LowRankConfig):
    """DoRA (Liu et al. 2024, arXiv:2402.09353): y = m V x / |V| with V = W + s B A, norms by output."""

    method: ClassVar[str] = "dora"
    parts: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ia3Config(AdapterConfig):
    """(IA)³ (Liu et al. 2022, arXiv:2205.05638): a vector scales what a linear layer returns, or what it reads."""

    method: ClassVar[str] = "ia3"
    parts: ClassVar[tuple[str, ...]] = ("ia3_l",)

    feedforward: tuple[str, ...] = ()
    """The targets whose input is scaled: the FFN's second layers. Filled in from the base; explicit paths."""

    def __post_init__(self) -> None:
        odd = sorted(set(self.feedforward) - set(self.targets))
        if odd:
            raise ConfigError(f"feedforward: {odd[0]!r:.80} is no target; wanted some of the targets")


@dataclass(frozen=True, slots=True, kw_only=True)
class BitfitConfig(AdapterConfig):
    """BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): what is added to the biases of linear layers and norms."""

    method: ClassVar[str] = "bitfit"
    parts: ClassVar[tuple[str, ...]] = ("bias_delta",)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateConfig(AdapterConfig):
    """What a merge of unlike adapters is: y = (W + ΔW) x + b + Δb with ΔW = B A + diag(p) W + W diag(q), exactly.

    LoRA, DoRA, (IA)³ and BitFit all are of this form, and so is every weighted sum of them.
    """

    method: ClassVar[str] = "update"
    parts: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight", "row_scale", "column_scale", "bias_delta")
    trained_by: ClassVar[str] = "merge"

    rank: int = 1
    """Rows of A where `rank_pattern` says no other number."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Rank of single modules where it differs from `rank`, by explicit path."""
    bias_only: tuple[str, ...] = ()
    """The targets that have Δb alone, such as norms."""
    rows: bool = False
    """Whether some p is not 0, so that W is needed beside what it returns."""
    columns: bool = False
    """Whether some q is not 0, so that W is needed a second time."""

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1:
                raise ConfigError(f"rank: got {rank}, wanted 1 or more")
        odd = sorted(set(self.bias_only) - set(self.targets))
        if odd:
            raise ConfigError(f"bias_only: {odd[0]!r:.80} is no target; wanted some of the targets")

    def rank_of(self, path: str) -> int:
        """The rank at one module."""
        return self.rank_pattern.get(path, self.rank)

    def parts_at(self, path: str) -> tuple[str, ...]:
        """What there is at one target."""
        return self.parts[-1:] if path in self.bias_only else self.parts


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixConfig(AdapterConfig):
    """Prefix tuning (Li and Liang 2021, arXiv:2101.00190): learned keys and values in front of each attention's own."""

    method: ClassVar[str] = "prefix"
    parts: ClassVar[tuple[str, ...]] = ("prefix_keys", "prefix_values")

    length: int = option("keys and values of each attention", 20)
    spread: float = option("standard deviation of fresh keys and values", 0.1)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"length: got {self.length}, wanted 1 or more")
        if not (math.isfinite(self.spread) and self.spread >= 0):
            raise ConfigError(f"spread: got {self.spread}, wanted a finite number of 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class AptConfig(PrefixConfig):
    """Adaptive prefix tuning (Zhang et al. 2023, arXiv:2305.15212): prefixes with a gate for each token and layer."""

    method: ClassVar[str] = "apt"
    parts: ClassVar[tuple[str, ...]] = (*PrefixConfig.parts, "apt_token.weight", "apt_layer")


Placement = Literal["houlsby", "pfeiffer", "parallel"]
Activation = Literal["relu", "gelu", "gelu_new", "silu", "tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BottleneckConfig(AdapterConfig):
    """Bottleneck adapter: U act(D h + c) + e, with D [size, d] and U [d, size].

    Houlsby et al. 2019 (arXiv:1902.00751): after attention and after the FFN; Pfeiffer et al. 2021
    (arXiv:2005.00247): once a layer, after the FFN's sum; He et al. 2022 (arXiv:2110.04366): parallel
    to the FFN, times `scale`.
    """

    method: ClassVar[str] = "bottleneck"
    parts: ClassVar[tuple[str, ...]] = (
        "adapter_down.weight",
        "adapter_down.bias",
        "adapter_up.weight",
        "adapter_up.bias",
    )

    placement: Placement = option("where it sits", "pfeiffer")
    size: int = option("hidden units of the bottleneck", 48)
    activation: Activation = option("non-linearity", "relu")
    scale: float = option("factor on the adapter's output", 1.0)
    dropout: float = option("dropout on the adapter's hidden units while training", 0.0)
    size_pattern: Mapping[str, int] = field(default_factory=dict)
    """Hidden units of single sites where they differ from `size`, by explicit path."""

    def __post_init__(self) -> None:
        for size in (self.size, *self.size_pattern.values()):
            if size < 1:
                raise ConfigError(f"size: got {size}, wanted 1 or more")
        _check_rate("dropout", self.dropout)

    def size_of(self, path: str) -> int:
        """The hidden units at one site."""
        return self.size_pattern.get(path, self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompacterConfig(BottleneckConfig):
    """Compacter (Karimi Mahabadi et al. 2021, arXiv:2106.04647): a bottleneck whose D and U are Σ_i A_i ⊗ s_i t_i."""

    method: ClassVar[str] = "compacter"
    parts: ClassVar[tuple[str, ...]] = (
        "phm_down_left",
        "phm_down_right",
        "adapter_down.bias",
        "phm_up_left",
        "phm_up_right",
        "adapter_up.bias",
        "phm_rule",
    )

    division: int = option("n, the Kronecker products in each sum; divides the size and the model's width", 4)
    factor_rank: int = option("rank of each s_i t_i", 1)
    spread: float = option("standard deviation of fresh A_i; 0.3 makes D about as large as a bottleneck's", 0.3)

    def __post_init__(self) -> None:
        BottleneckConfig.__post_init__(self)
        for name in ("division", "factor_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted 1 or more")
        for size in (self.size, *self.size_pattern.values()):
            if size % self.division:
                raise ConfigError(f"size: got {size}, wanted a multiple of the division, {self.division}")
        if not (math.isfinite(self.spread) and self.spread > 0):
            raise ConfigError(f"spread: got {self.spread}, wanted a finite number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterdropConfig(BottleneckConfig):
    """AdapterDrop (Rücklé et al. 2021, arXiv:2010.11918): a bottleneck that also works without its first n layers."""

    method: ClassVar[str] = "adapterdrop"
    stored_as: ClassVar[str] = "bottleneck"

    most: int = option("a step leaves out the first n layers, n drawn from 0 to this", 4)

    def __post_init__(self) -> None:
        BottleneckConfig.__post_init__(self)
        if self.most < 1:
            raise ConfigError(f"most: got {self.most}, wanted 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseConfig(BottleneckConfig):
    """SparseAdapter (He et al. 2022, arXiv:2210.04284): a large bottleneck, pruned before it is trained."""

    method: ClassVar[str] = "sparse"
    stored_as: ClassVar[str] = "bottleneck"

    pruned: float = option("share of the weights that are 0 from the start", 0.8)
    spread: float = option("standard deviation of fresh weights; the first gradients need some in U", 0.01)

    def __post_init__(self) -> None:
        BottleneckConfig.__post_init__(self)
        _check_rate("pruned", self.pruned)
        if not (math.isfinite(self.spread) and self.spread > 0):
            raise ConfigError(f"spread: got {self.spread}, wanted a finite number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamixConfig(BottleneckConfig):
    """AdaMix (Wang et al. 2022, arXiv:2205.12410): several bottlenecks learn, a step takes one at random; then their
    mean."""

    method: ClassVar[str] = "adamix"
    stored_as: ClassVar[str] = "bottleneck"

    experts: int = option("bottlenecks that learn at each place", 4)
    consistency: float = option("w: factor on how far two random choices disagree", 1.0)

    def __post_init__(self) -> None:
        BottleneckConfig.__post_init__(self)
        if self.experts < 2:
            raise ConfigError(f"experts: got {self.experts}, wanted 2 or more")
        if not (math.isfinite(self.consistency) and self.consistency >= 0):
            raise ConfigError(f"consistency: got {self.consistency}, wanted a finite number of 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnipeltConfig(AdapterConfig):
    """UniPELT (Mao et al. 2022, arXiv:2110.07577): LoRA, prefixes and bottlenecks in each layer, all behind gates."""

    method: ClassVar[str] = "unipelt"
    parts: ClassVar[tuple[str, ...]] = (
        *LoraConfig.parts,
        *PrefixConfig.parts,
        *BottleneckConfig.parts,
        "gate.weight",
        "gate.bias",
    )

    rank: int = option("rank of the LoRA at queries and values", 8)
    alpha: float = option("scale of the LoRA: s = alpha / rank", 16.0)
    length: int = option("keys and values in front of each attention's", 10)
    size: int = option("hidden units of the bottleneck behind each FFN", 48)
    activation: Activation = option("non-linearity of the bottleneck", "relu")
    spread: float = option("standard deviation of fresh keys and values", 0.1)
    attentions: tuple[str, ...] = ()
    """The targets that are attentions. Filled in from the base; explicit paths."""
    ends: tuple[str, ...] = ()
    """The targets where FFNs end. Filled in from the base; explicit paths."""

    def __post_init__(self) -> None:
        for name in ("rank", "length", "size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted 1 or more")
        if not (math.isfinite(self.spread) and self.spread >= 0):
            raise ConfigError(f"spread: got {self.spread}, wanted a finite number of 0 or more")
        odd = sorted({*self.attentions, *self.ends} - set(self.targets))
        if odd:
            raise ConfigError(f"attentions, ends: {odd[0]!r:.80} is no target; wanted some of the targets")


@dataclass(frozen=True, slots=True, kw_only=True)
class KronaConfig(AdapterConfig):
    """KronA (Edalati et al. 2022, arXiv:2212.10650): y = W x + s (A ⊗ B) x."""

    method: ClassVar[str] = "krona"
    parts: ClassVar[tuple[str, ...]] = ("krona_A", "krona_B")

    factor: int = option("most columns of A and rows of B; the largest divisor of both widths up to it is taken", 32)
    strength: float = option("s, the factor on the update", 1.0)
    dropout: float = option("dropout on the update's input while training", 0.0)

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ConfigError(f"factor: got {self.factor}, wanted 1 or more")
        if not math.isfinite(self.strength):
            raise ConfigError(f"strength: got {self.strength}, wanted a finite number")
        _check_rate("dropout", self.dropout)


Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposedConfig(AdapterConfig):
    """A module that `hub compose` trains. It knows the shapes of all its tensors but the head's."""

    parts: ClassVar[tuple[str, ...]] = ()
    trained_by: ClassVar[str] = "compose"

    def tensor_shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor but the head's, by its name in `Adapter.tensors`."""
        raise NotImplementedError


Track = Literal["lora", "serial", "parallel"]
"""Where an update joins the base: on a linear layer, on the residual stream, beside the FFN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionPlace:
    """One place where sources are fused."""

    path: str
    """The module, by its explicit path."""
    track: Track
    """How the sources sit there: `lora`, `serial` (houlsby, pfeiffer) or `parallel`."""
    inputs: int
    """Width of what the sources and the query read."""
    outputs: int
    """Width of what the sources add."""
    sources: tuple[int, ...]
    """Which sources sit here, by their position among the composed parents, ascending."""

    def shapes(self) -> Mapping[str, Shape]:
        """Shapes of the tensors at this place, by their names behind the path."""
        wide, square = (self.outputs, self.inputs), (self.outputs, self.outputs)
        shapes = {"query.weight": wide, "query.bias": (self.outputs,), "key.weight": square, "value.weight": square}
        return {f"fusion_{self.track}_{part}": shape for part, shape in shapes.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionConfig(ComposedConfig):
    """AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247): attention over the outputs of several adapters."""

    method: ClassVar[str] = "fusion"

    dropout: float = option("dropout on the attention's logits while training", 0.0)
    regularisation: float = option("factor on the sum of |V - I|^2 that is added to the loss", 0.01)
    places: tuple[FusionPlace, ...] = ()
    """Where what is fused; filled in from the sources."""
    sources: int = 0
    """How many adapters it works on: its parents of relation `composed`, in order."""

    def __post_init__(self) -> None:
        _check_rate("dropout", self.dropout)
        if not (math.isfinite(self.regularisation) and self.regularisation >= 0):
            raise ConfigError(f"regularisation: got {self.regularisation}, wanted a finite number of 0 or more")
        for place in self.places:
            self._check_place(place)
        names = [(place.path, place.track) for place in self.places]
        if len(set(names)) != len(names):
            raise ConfigError("places: the same path and track twice; wanted each once")

    def _check_place(self, place: FusionPlace) -> None:
        ordered = list(place.sources) == sorted(set(place.sources))
        if not place.sources or not ordered or place.sources[0] < 0 or place.sources[-1] >= self.sources:
            raise ConfigError(
                f"places: {place.path} has the sources {list(place.sources)}, wanted one or more of 0 to "
                f"{self.sources - 1}, ascending"
            )
        if place.path not in self.targets or min(place.inputs, place.outputs) < 1:
            raise ConfigError(f"places: {place.path} is no target, or is {place.inputs} x {place.outputs} wide")

    def at(self, path: str) -> tuple[FusionPlace, ...]:
        """The places at one module."""
        return tuple(place for place in self.places if place.path == path)

    def tensor_shapes(self) -> Mapping[str, Shape]:
        """See `ComposedConfig`."""
        return {f"{place.path}.{part}": shape for place in self.places for part, shape in place.shapes().items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class SmopConfig(ComposedConfig):
    """SMoP (Choi et al., EMNLP 2023): k short prompts at the input, of which a router picks one for each row.

    With one prompt it is plain prompt tuning (Lester et al. 2021, arXiv:2104.08691), the baseline of the paper: there
    is nothing to route, so it has no router.
    """

    method: ClassVar[str] = "smop"

    prompts: int = option("k, the prompts that rows are routed to; 1 is plain prompt tuning", 4)
    length: int = option("l, the soft tokens of each prompt", 5)
    noise: float = option("standard deviation of the factor on the router's logits while training", 1.0)
    spread: float = option("standard deviation of fresh prompts", 1.0)
    width: int = 0
    """d, the width of the input embeddings; filled in from the base."""

    def __post_init__(self) -> None:
        for name in ("prompts", "length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted 1 or more")
        for name in ("noise", "spread"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}: got {value}, wanted a finite number of 0 or more")
        if self.width < 0 or (self.width and len(self.targets) != 1):
            raise ConfigError(f"targets: got {len(self.targets)}, wanted the input embeddings alone")

    def shapes(self) -> Mapping[str, Shape]:
        """Shapes of the tensors, by their names behind the path of the input embeddings."""
        shapes: dict[str, Shape] = {"smop_prompts": (self.prompts, self.length, self.width)}
        return shapes if self.prompts == 1 else {**shapes, "smop_router.weight": (self.prompts, self.width)}

    def tensor_shapes(self) -> Mapping[str, Shape]:
        """See `ComposedConfig`."""
        return {f"{path}.{part}": shape for path in self.targets for part, shape in self.shapes().items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig(ComposedConfig):
    """Prompt tuning (Lester et al. 2021, arXiv:2104.08691): one prompt at the input, the same for every row."""

    method: ClassVar[str] = "prompt"
    trained_by: ClassVar[str] = "train"

    length: int = option("soft tokens of the prompt", 20)
    start: Literal["vocabulary", "normal"] = option("a fresh prompt: tokens of the vocabulary, or noise", "vocabulary")
    spread: float = option("standard deviation of a fresh prompt of noise", 1.0)
    width: int = 0
    """d, the width of the input embeddings; filled in from the base."""

    def __post_init__(self) -> None:
        # what SMoP with one prompt checks
        SmopConfig(prompts=1, length=self.length, spread=self.spread, width=self.width, targets=self.targets)

    @property
    def prompts(self) -> int:
        """One: nothing is routed."""
        return 1

    @property
    def noise(self) -> float:
        """None, as there is no router."""
        return 0.0

    def shapes(self) -> Mapping[str, Shape]:
        """Shapes of the tensors, by their names behind the path of the input embeddings; as of SMoP's one prompt."""
        return {"smop_prompts": (1, self.length, self.width)}

    def tensor_shapes(self) -> Mapping[str, Shape]:
        """See `ComposedConfig`."""
        return {f"{path}.{part}": shape for path in self.targets for part, shape in self.shapes().items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class NormedBottleneckConfig(BottleneckConfig):
    """A bottleneck with a LayerNorm of its own behind it, as Hyperformer makes them: LN(U act(D h + c) + e)."""

    method: ClassVar[str] = "normed_bottleneck"
    parts: ClassVar[tuple[str, ...]] = (*BottleneckConfig.parts, "adapter_norm.weight", "adapter_norm.bias")
    trained_by: ClassVar[str] = "compose"


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperPlace:
    """One place whose adapter is generated."""

    path: str
    """The module, by its explicit path."""
    stack: str
    """Which generator makes it: one for each stack of layers, `encoder` or `decoder`."""
    layer: int
    """Number of the layer in its stack, from 0."""
    position: int
    """Number of the place in its layer, from 0."""
    inputs: int
    """Width of what the adapter reads."""
    outputs: int
    """Width of what it adds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperTask:
    """One task of a hyperformer; the fields are those of `TaskInfo`."""

    name: str
    kind: str
    source: str = ""
    """The task file, or sample, that it was trained on."""
    labels: tuple[str, ...] = ()
    max_length: int = 128
    template: str = "{text}"
    head: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the tensors of its head, by their names in the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperformerConfig(ComposedConfig):
    """Hyperformer and Hyperformer++ (Karimi Mahabadi et al. 2021, arXiv:2106.04489): adapters from a generator."""

    method: ClassVar[str] = "hyperformer"

    shared: bool = option("one generator for all layers (Hyperformer++), or one for each place (Hyperformer)", True)
    generates: Literal["bottleneck", "lora"] = option("what is generated", "bottleneck")
    size: int = option("hidden units, or rank, of what is generated", 24)
    activation: Activation = option("non-linearity of a bottleneck", "gelu")
    embedding: int = option("width of the embeddings of tasks, layers and positions", 64)
    hidden: int = option("hidden units of the generator", 128)
    places: tuple[HyperPlace, ...] = ()
    """What is generated where; filled in from the base."""
    tasks: tuple[HyperTask, ...] = ()
    """The tasks, in order; filled in by training."""

    def __post_init__(self) -> None:
        for name in ("size", "embedding", "hidden"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted 1 or more")
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ConfigError(f"tasks: got {', '.join(names)}; each may be there once")
        if sorted(place.path for place in self.places) != sorted(self.targets) and self.places:
            raise ConfigError("places: wanted one for each target")
        if any(min(p.layer, p.position, p.inputs - 1, p.outputs - 1) < 0 for p in self.places):
            raise ConfigError("places: wanted layers and positions from 0, and widths of 1 or more")

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks of layers, each with a generator of its own."""
        return tuple(sorted({place.stack for place in self.places}))

    def made_at(self, place: HyperPlace) -> Mapping[str, Shape]:
        """Shapes of the tensors that are generated for a place, by their names behind its path."""
        if self.generates == "lora":
            return {"lora_A.weight": (self.size, place.inputs), "lora_B.weight": (place.outputs, self.size)}
        shapes = ((self.size, place.inputs), (self.size,), (place.outputs, self.size), *(((place.outputs,),) * 3))
        return dict(zip(NormedBottleneckConfig.parts, shapes, strict=True))

    def maker(self, place: HyperPlace, part: str) -> str:
        """What the linear layer is called that makes a tensor; places with tensors of one shape share it in ++."""
        if not self.shared:
            return f"{place.stack}.{place.layer}.{place.position}.{part.replace('.', '_')}"
        return f"{place.stack}.{part.replace('.', '_')}_{'x'.join(map(str, self.made_at(place)[part]))}"

    def tensor_shapes(self) -> Mapping[str, Shape]:
        """See `ComposedConfig`."""
        shapes: dict[str, Shape] = {}
        for stack in self.stacks:
            here = [place for place in self.places if place.stack == stack]
            parts = 3 if self.shared else 1
            shapes |= {
                f"{stack}.project_in.weight": (self.hidden, parts * self.embedding),
                f"{stack}.project_in.bias": (self.hidden,),
                f"{stack}.project_out.weight": (self.embedding, self.hidden),
                f"{stack}.project_out.bias": (self.embedding,),
                f"{stack}.norm.weight": (self.embedding,),
                f"{stack}.norm.bias": (self.embedding,),
            }
            if self.shared:
                shapes[f"{stack}.layers"] = (1 + max(place.layer for place in here), self.embedding)
                shapes[f"{stack}.positions"] = (1 + max(place.position for place in here), self.embedding)
            for place in here:
                for part, shape in self.made_at(place).items():
                    count = math.prod(shape)
                    shapes[f"{self.maker(place, part)}.weight"] = (count, self.embedding)
                    shapes[f"{self.maker(place, part)}.bias"] = (count,)
        for number, task in enumerate(self.tasks):
            shapes[f"tasks.{number}.embedding"] = (self.embedding,)
            shapes |= {f"tasks.{number}.head.{name}": tuple(shape) for name, shape in task.head.items()}
        return shapes


CONFIGS: Mapping[str, type[AdapterConfig]] = {
    kind.method: kind
    for kind in (
        LoraConfig,
        LoraBiasConfig,
        DoraConfig,
        Ia3Config,
        BitfitConfig,
        UpdateConfig,
        PrefixConfig,
        AptConfig,
        BottleneckConfig,
        CompacterConfig,
        KronaConfig,
        UnipeltConfig,
        DyloraConfig,
        SoraConfig,
        AdapterdropConfig,
        SparseConfig,
        AdamixConfig,
        NormedBottleneckConfig,
        FusionConfig,
        SmopConfig,
        PromptConfig,
        HyperformerConfig,
    )
} | {kind.method: kind for kind in PEFT_CONFIGS}
"""Every method that can be stored, by name."""


def config_to_json(config: AdapterConfig) -> Json:
    """The configuration with its method's name."""
    return {"method": config.method, **encode(config)}


def config_from_json(data: Json, where: str) -> AdapterConfig:
    """The inverse of `config_to_json`.

    Raises:
        ConfigError: If the method is unknown or a value does not fit.
    """
    method = data.get("method") if isinstance(data, dict) else None
    kind = CONFIGS.get(method) if isinstance(method, str) else None
    if kind is None:
        raise ConfigError(f"{where}: unknown adapter method {method!r}; known: {', '.join(CONFIGS)}")
    return decode(kind, {key: value for key, value in data.items() if key != "method"}, where)
