"""A generator of adapters that knows its tasks by prototypes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from graftory.config.base import option
from graftory.config.composed import Shape
from graftory.config.hyperformer import HyperformerConfig
from graftory.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaConfig(HyperformerConfig):
    """PHA (Zhao et al. 2023, arXiv:2310.11670): a hyperformer whose embeddings of tasks are prototypes."""

    method: ClassVar[str] = "pha"

    contrast: float = option("λ: factor on the two contrastive losses", 0.1)
    contrast_temperature: float = option("τ of the contrastive losses", 0.1)
    contrast_rows: int = option("rows of each task that a step compares", 16)
    retriever: int = option("hidden units of the retriever", 128)
    width: int = 0
    """Width of what the retriever reads; filled in from the base."""

    def __post_init__(self) -> None:
        HyperformerConfig.__post_init__(self)
        for name in ("contrast_rows", "retriever"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted 1 or more")
        if not (math.isfinite(self.contrast) and self.contrast >= 0):
            raise ConfigError(f"contrast: got {self.contrast}, wanted a finite number of 0 or more")
        if not (math.isfinite(self.contrast_temperature) and self.contrast_temperature > 0):
            raise ConfigError(f"contrast_temperature: got {self.contrast_temperature}, wanted a finite number above 0")
        if self.width < 0:
            raise ConfigError(f"width: got {self.width}, wanted 0 or more")

    def reading(self, width: int) -> PhaConfig:
        """See `HyperformerConfig.reading`."""
        return replace(self, width=width)

    def tensor_shapes(self) -> Mapping[str, Shape]:
        """See `ComposedConfig`."""
        return {
            **HyperformerConfig.tensor_shapes(self),
            "retriever.project_in.weight": (self.retriever, self.width),
            "retriever.project_in.bias": (self.retriever,),
            "retriever.project_out.weight": (self.embedding, self.retriever),
            "retriever.project_out.bias": (self.embedding,),
        }
