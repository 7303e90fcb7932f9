"""linear: the weighted sum of the updates themselves (task arithmetic), exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graftory.compose.merge.base import Body, MergeMethod, MergeParameters, check_rank
from graftory.compose.merge.bottleneck import concatenate
from graftory.compose.merge.sites import LINEAR_METHODS, taking_part
from graftory.compose.merge.weighted import weighted_sum
from graftory.config import option
from graftory.errors import MergeError


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearParameters(MergeParameters):
    """Parameters of `linear`."""

    rank: int | None = option("cut the merged update to this rank (LoRA; the best one, by SVD)", None)

    def __post_init__(self) -> None:
        check_rank(self.rank)


def linear(bodies: Sequence[Body], weights: Sequence[float], parameters: LinearParameters) -> Body:
    """Δ = Σ w_t Δ_t on the updates, never on the factors: ΔW and Δb, or the adapter's output for bottlenecks.

    Methods, ranks, alphas, rsLoRA and targets may differ. Adapters of weight 0 take no part.

    Raises:
        MergeError: If all weights are 0, shapes disagree, or a rank is asked of bottleneck adapters.
    """
    if bodies[0].config.method not in LINEAR_METHODS:
        if parameters.rank is not None:
            raise MergeError(
                "rank: bottleneck adapters have a non-linearity, which no SVD can cut; leave the rank out "
                "(the merged bottleneck has all hidden units)"
            )
        return concatenate(*taking_part(bodies, weights))
    return weighted_sum(bodies, weights, parameters.rank)


LINEAR = MergeMethod(
    name="linear",
    title="Linear (task arithmetic in delta space)",
    paper="https://arxiv.org/abs/2212.04089",
    space="delta",
    accepts=(*LINEAR_METHODS, "bottleneck"),
    params=LinearParameters,
    default_weight=lambda n: 1.0 / n,
    fn=linear,
)
