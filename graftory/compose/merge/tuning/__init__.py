"""Finding what a merge needs on a few rows: weights, or the method itself."""

from graftory.compose.merge.tuning.adamerging import TunedLayers, tune_layers
from graftory.compose.merge.tuning.auto import PORTFOLIO, AutoParameters, Candidate, Chosen, Judged, auto_merge
from graftory.compose.merge.tuning.lorahub import Tried, tune_weights

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
