"""Low-rank updates of linear layers, and the ways to train them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from graftory.config.base import AdapterConfig, check_rate, option
from graftory.errors import ConfigError


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
        check_rate("dropout", self.dropout)

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
