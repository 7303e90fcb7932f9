"""Finding what a merge needs on a few rows: weights, or the method itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftory.compose.merge.tuning.parameters import AutoParameters
from graftory.lazy import lazily

if TYPE_CHECKING:
    from graftory.compose.merge.tuning.adamerging import TunedLayers, tune_layers
    from graftory.compose.merge.tuning.auto import Chosen, auto_merge
    from graftory.compose.merge.tuning.lorahub import Tried, tune_weights
    from graftory.compose.merge.tuning.portfolio import PORTFOLIO, Candidate
    from graftory.compose.merge.tuning.race import Judged

__all__ = [
    "PORTFOLIO",
    "AutoParameters",
    "Candidate",
    "Chosen",
    "Judged",
    "Tried",
    "TunedLayers",
    "auto_merge",
    "tune_layers",
    "tune_weights",
]

__getattr__ = lazily(
    __name__,
    {
        "PORTFOLIO": "graftory.compose.merge.tuning.portfolio",
        "Candidate": "graftory.compose.merge.tuning.portfolio",
        "Chosen": "graftory.compose.merge.tuning.auto",
        "Judged": "graftory.compose.merge.tuning.race",
        "Tried": "graftory.compose.merge.tuning.lorahub",
        "TunedLayers": "graftory.compose.merge.tuning.adamerging",
        "auto_merge": "graftory.compose.merge.tuning.auto",
        "tune_layers": "graftory.compose.merge.tuning.adamerging",
        "tune_weights": "graftory.compose.merge.tuning.lorahub",
    },
)
