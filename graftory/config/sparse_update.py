"""Updates of single weights, beside a LoRA or alone, and the ways to train them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from graftory.config.base import AdapterConfig, check_rate, option
from graftory.config.low_rank import LoraConfig
from graftory.errors import ConfigError

_MOST = 2**31 - 1
"""The largest position that an int32 holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsePlace:
    """How many weights of one linear layer change."""

    path: str
    count: int
    inputs: int
    outputs: int

    def __post_init__(self) -> None:
        if self.inputs < 1 or self.outputs < 1 or self.inputs * self.outputs > _MOST:
            raise ConfigError(
                f"{self.path}: a weight of {self.outputs} x {self.inputs}, wanted 1 to {_MOST} numbers; leave it out "
                "of the targets"
            )
        if not 1 <= self.count <= self.inputs * self.outputs:
            raise ConfigError(
                f"{self.path}: {self.count} entries of a weight of {self.outputs} x {self.inputs}, wanted 1 to all"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseUpdateConfig(AdapterConfig):
    """Few weights of linear layers change by numbers of their own, and others by a LoRA: y = (W + S) x + s B A x.

    S is 0 but at `count` positions. It is kept as them, row · d_in + column, int32 and in order, and their values. A
    target has S, a LoRA, or both.
    """

    method: ClassVar[str] = "sparse_update"
    parts: ClassVar[tuple[str, ...]] = ("sparse_index", "sparse_value", *LoraConfig.parts)
    whole_numbers: ClassVar[tuple[str, ...]] = parts[:1]
    trained_by: ClassVar[str] = "merge"

    sparse: tuple[SparsePlace, ...] = ()
    """The targets with S."""
    low_rank: LoraConfig | None = None
    """The LoRA of the others, whose targets are explicit; None if there are none."""

    def __post_init__(self) -> None:
        paths = [place.path for place in self.sparse]
        lora = () if self.low_rank is None else self.low_rank.targets
        if len(set(paths)) < len(paths) or len(set(lora)) < len(lora):
            raise ConfigError("sparse: a module is listed twice; wanted each once")
        # what has no targets is a head without its body
        odd = sorted({*paths, *lora} ^ set(self.targets)) if self.targets and (paths or lora) else []
        if odd:
            raise ConfigError(f"sparse: {odd[0]!r:.80} is only in one of the targets and the sparse or LoRA modules")

    def place_of(self, path: str) -> SparsePlace | None:
        """The entries at one module."""
        return next((place for place in self.sparse if place.path == path), None)

    def parts_at(self, path: str) -> tuple[str, ...]:
        """What there is at one target."""
        lora = self.low_rank is not None and path in self.low_rank.targets
        return (*(self.parts[:2] if self.place_of(path) else ()), *(self.parts[2:] if lora else ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffConfig(SparseUpdateConfig):
    """Diff pruning (Guo et al. 2021, arXiv:2012.07463): an update of all weights, of which L0 and size leave a few."""

    method: ClassVar[str] = "diff"
    trained_by: ClassVar[str] = "train"
    stored_as: ClassVar[str] = "sparse_update"

    keep: float = option("share of the targets' weights that change in the end", 0.005)
    penalty: float = option("λ: what a weight that may change costs in the loss", 1.25e-7)
    grouped: bool = option("a gate for each matrix beside those of its weights", True)
    fixed: float = option("share of the steps, the last ones, in which it is settled which weights change", 0.5)
    first_rate: float = option("highest learning rate of the weights before that; then it is --learning-rate", 1e-4)
    gate_start: float = option("log α at the start; at 5 nearly all gates are open", 5.0)
    gate_rate: float = option("highest learning rate of log α", 0.1)
    temperature: float = option("β of the gates", 1.0)
    stretch_low: float = option("γ: gates reach from here ...", -1.5)
    stretch_high: float = option("ζ: ... to here before they are cut to 0 and 1", 1.5)

    def __post_init__(self) -> None:
        SparseUpdateConfig.__post_init__(self)
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep: got {self.keep}, wanted more than 0 and at most 1")
        if not 0 <= self.fixed <= 1:
            raise ConfigError(f"fixed: got {self.fixed}, wanted 0 to 1")
        for name in ("penalty", "gate_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}: got {value}, wanted a finite number of 0 or more")
        for name in ("temperature", "first_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: got {value}, wanted a finite number above 0")
        if not (math.isfinite(self.gate_start) and abs(self.gate_start) <= 50):
            raise ConfigError(f"gate_start: got {self.gate_start}, wanted -50 to 50")
        if not (-math.inf < self.stretch_low < 0 and 1 < self.stretch_high < math.inf):
            raise ConfigError(
                f"stretch_low and stretch_high: got {self.stretch_low} and {self.stretch_high}, wanted one below 0 and "
                "one above 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SptConfig(SparseUpdateConfig):
    """SPT (He et al. 2023, arXiv:2303.08566): a LoRA where many weights are sensitive, single weights elsewhere."""

    method: ClassVar[str] = "spt"
    trained_by: ClassVar[str] = "train"
    stored_as: ClassVar[str] = "sparse_update"

    budget: float = option("most numbers that learn, as a share of the targets' weights", 0.005)
    rank: int = option("rank r of the LoRAs", 8)
    alpha: float = option("scale of the LoRAs: s = alpha / rank", 16.0)
    dropout: float = option("dropout on the input of A while training", 0.0)
    structured: float = option("a module with so many sensitive weights, as a share of its LoRA's, gets the LoRA", 0.2)
    sensitivity_rows: int = option("training rows, the first ones, whose gradients say what is sensitive", 256)

    def __post_init__(self) -> None:
        SparseUpdateConfig.__post_init__(self)
        check_rate("dropout", self.dropout)
        for name in ("rank", "sensitivity_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted 1 or more")
        for name in ("budget", "structured"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted more than 0 and at most 1")
