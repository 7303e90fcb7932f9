"""Bottlenecks, and the ways to train them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from graftory.config.base import AdapterConfig, check_rate, option
from graftory.errors import ConfigError

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
        check_rate("dropout", self.dropout)

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
class PropetlConfig(BottleneckConfig):
    """ProPETL (Zeng et al. 2023, arXiv:2305.17682): one bottleneck for all layers, and a binary mask for each."""

    method: ClassVar[str] = "propetl"
    parts: ClassVar[tuple[str, ...]] = (
        "mask_down",
        "mask_up",
        "prototype_down.weight",
        "prototype_down.bias",
        "prototype_up.weight",
        "prototype_up.bias",
    )
    bits: ClassVar[tuple[str, ...]] = parts[:2]

    kept: float = option("share of the common weights that a layer keeps", 0.5)
    mask_learning_rate: float = option("highest learning rate of the scores that masks are made of", 3e-3)

    def __post_init__(self) -> None:
        BottleneckConfig.__post_init__(self)
        if self.size_pattern:
            raise ConfigError("size_pattern: all layers of propetl share one bottleneck, wanted none; set size")
        if not 0 < self.kept <= 1:
            raise ConfigError(f"kept: got {self.kept}, wanted more than 0 and at most 1")
        if not (math.isfinite(self.mask_learning_rate) and self.mask_learning_rate >= 0):
            raise ConfigError(f"mask_learning_rate: got {self.mask_learning_rate}, wanted a finite number of 0 or more")


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
        check_rate("pruned", self.pruned)
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
class NormedBottleneckConfig(BottleneckConfig):
    """A bottleneck with a LayerNorm of its own behind it, as Hyperformer makes them: LN(U act(D h + c) + e)."""

    method: ClassVar[str] = "normed_bottleneck"
    parts: ClassVar[tuple[str, ...]] = (*BottleneckConfig.parts, "adapter_norm.weight", "adapter_norm.bias")
    trained_by: ClassVar[str] = "compose"
