"""lorahub: the weighted sum of updates, its weights found on a few examples without gradients."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class LorahubParameters(CoreParameters):
    """Parameters of `lorahub`; all but rank and scaling say how the weights are found."""

    l1: float = option("tuning: factor on Σ |w|", 0.05)
    bound: float = option("tuning: largest |w|", 1.5)
    tries: int = option("tuning: weights that are tried", 40)

    def __post_init__(self) -> None:
        CoreParameters.__post_init__(self)
        if not (math.isfinite(self.l1) and self.l1 >= 0 and math.isfinite(self.bound) and self.bound > 0):
            raise MergeError(f"l1 {self.l1:g}, bound {self.bound:g}: wanted 0 or more, and above 0")
        if self.tries < 1:
            raise MergeError(f"tries: got {self.tries}, wanted 1 or more")


def lorahub(bodies: Sequence[Body], weights: Sequence[float], parameters: LorahubParameters) -> Body:
    """Δ = λ Σ w_t Δ_t with the weights of `tune_weights` (LoraHub, Huang et al. 2023, arXiv:2307.13269).

    The paper adds factors, (Σ w_t B_t)(Σ w_t A_t), which has cross terms; here the updates are added.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """
    return weighted_sum(bodies, weights, parameters.rank, parameters.scaling)


LORAHUB = MergeMethod(
    name="lorahub",
    title="LoraHub (weights from a few examples)",
    paper="https://arxiv.org/abs/2307.13269",
    space="delta",
    accepts=LINEAR_METHODS,
    params=LorahubParameters,
    default_weight=lambda n: 1.0 / n,
    fn=lorahub,
)
