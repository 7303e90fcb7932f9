"""Keys and values in front of attention, alone and gated beside others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from graftory.config.base import AdapterConfig, option
from graftory.config.bottleneck import Activation, BottleneckConfig
from graftory.config.low_rank import LoraConfig
from graftory.errors import ConfigError


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
