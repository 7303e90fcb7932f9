"""linear: the weighted sum of the updates themselves (task arithmetic), exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graftory.compose.merge.base import Body, MergeMethod, MergeParameters
from graftory.compose.merge.bottleneck import concatenate
from graftory.compose.merge.lora import lora_body, truncate, weighted_sum
from graftory.config import LoraConfig, option
from graftory.errors import MergeError


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearParameters(MergeParameters):
    """Parameters of `linear`."""

    rank: int | None = option("cut the merged update to this rank (LoRA; the best one, by SVD)", None)

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise MergeError(f"rank: got {self.rank}, wanted 1 or more")


def linear(bodies: Sequence[Body], weights: Sequence[float], parameters: LinearParameters) -> Body:
    """Δ = Σ w_t Δ_t on the updates, never on the factors: ΔW for LoRA, the adapter's output for bottlenecks.

    Ranks, alphas, rsLoRA and targets may differ. Adapters of weight 0 take no part.

    Raises:
        MergeError: If all weights are 0, shapes disagree, or a rank is asked of bottleneck adapters.
    """
    taking_part = [(body, weight) for body, weight in zip(bodies, weights, strict=True) if weight != 0]
    if not taking_part:
        raise MergeError("all weights are 0: nothing is left to merge; give at least one weight other than 0")
    chosen, factors = [body for body, _ in taking_part], [weight for _, weight in taking_part]
    if not isinstance(chosen[0].config, LoraConfig):
        if parameters.rank is not None:
            raise MergeError(
                "rank: bottleneck adapters have a non-linearity, which no SVD can cut; leave the rank out "
                "(the merged bottleneck has all hidden units)"
            )
        return concatenate(chosen, factors)
    merged = weighted_sum(chosen, factors)
    if parameters.rank is not None:
        merged = {path: truncate(b, a, parameters.rank) for path, (b, a) in merged.items()}
    return lora_body(merged, max(body.config.dropout for body in chosen if isinstance(body.config, LoraConfig)))


LINEAR = MergeMethod(
    name="linear",
    title="Linear (task arithmetic in delta space)",
    paper="https://arxiv.org/abs/2212.04089",
    space="delta",
    accepts=("lora", "bottleneck"),
    params=LinearParameters,
    default_weight=lambda n: 1.0 / n,
    fn=linear,
)
