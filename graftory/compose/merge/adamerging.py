"""adamerging: the sum of updates with a weight for each layer and adapter, found by entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graftory.compose.merge.base import Body, MergeMethod
from graftory.compose.merge.sites import LINEAR_METHODS
from graftory.compose.merge.spectrum import CoreParameters
from graftory.compose.merge.weighted import weighted_sum
from graftory.config import option
from graftory.errors import MergeError

START = 0.3
"""Weight of task arithmetic, where the paper starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamergingParameters(CoreParameters):
    """Parameters of `adamerging`; all but rank and scaling say how the weights are found."""

    start: float = option("tuning: weight to start from", START)
    steps: int = option("tuning: steps of Adam", 100)
    step_size: float = option("tuning: learning rate of the weights", 0.01)
    step_rows: int = option("tuning: inputs of each task a step", 16)

    def __post_init__(self) -> None:
        CoreParameters.__post_init__(self)
        if self.steps < 1 or self.step_rows < 1:
            raise MergeError(f"steps {self.steps}, step_rows {self.step_rows}: wanted 1 or more")
        if not (0 <= self.start <= 1 and math.isfinite(self.step_size) and self.step_size > 0):
            raise MergeError(f"start {self.start:g}, step_size {self.step_size:g}: wanted 0 to 1, and above 0")


def adamerging(bodies: Sequence[Body], weights: Sequence[float], parameters: AdamergingParameters) -> Body:
    """Δ^l = λ Σ_t w_t^l Δ_t^l in each layer l, with the weights of `tune_layers` (AdaMerging, arXiv:2310.02575).

    Yang et al. 2024. Where none were tuned all are 0.3, which is task arithmetic.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """
    return weighted_sum(bodies, weights, parameters.rank, parameters.scaling)


ADAMERGING = MergeMethod(
    name="adamerging",
    title="AdaMerging (layer-wise weights by entropy)",
    paper="https://arxiv.org/abs/2310.02575",
    space="delta",
    accepts=LINEAR_METHODS,
    params=AdamergingParameters,
    default_weight=lambda _: START,
    fn=adamerging,
)
