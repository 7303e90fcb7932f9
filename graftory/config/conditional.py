"""Adapters that let the frozen layers see some of the tokens alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from graftory.config.base import AdapterConfig, option
from graftory.config.bottleneck import Activation, BottleneckConfig
from graftory.errors import ConfigError

Attends = Literal["full", "k_to_all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CodaConfig(AdapterConfig):
    """CoDA (Lei et al. 2023, arXiv:2304.04947): a router sends some tokens through the frozen layer, all through a
    bottleneck beside it."""

    method: ClassVar[str] = "coda"
    parts: ClassVar[tuple[str, ...]] = (*BottleneckConfig.parts, "coda_router.weight")

    share: float = option("share of a text's tokens that go through the frozen layers, above 0 and at most 1", 1 / 3)
    attention: Attends = option(
        "full: every token attends, FFNs alone are skipped; k_to_all: the chosen alone attend, to all", "full"
    )
    softness: float = option("ε of the soft top-k; near 0 every chosen token counts fully", 1.0)
    size: int = option("hidden units of the bottleneck beside each FFN", 48)
    activation: Activation = option("non-linearity of the bottleneck", "relu")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"share: got {self.share}, wanted above 0 and at most 1")
        if not (math.isfinite(self.softness) and self.softness > 0):
            raise ConfigError(f"softness: got {self.softness}, wanted a finite number above 0")
        if self.size < 1:
            raise ConfigError(f"size: got {self.size}, wanted 1 or more")
