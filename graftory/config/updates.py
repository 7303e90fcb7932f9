"""What else changes weights: scales, biases, Kronecker products, and what merges make of several kinds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from graftory.config.base import AdapterConfig, check_rate, option
from graftory.errors import ConfigError


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
        check_rate("dropout", self.dropout)


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
