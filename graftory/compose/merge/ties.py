"""ties: trim each update, elect a sign for each entry, take the mean of those that agree. magnitude: trim and add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graftory.compose.merge.base import Body, MergeMethod
from graftory.compose.merge.elementwise import RECIPES, EntryParameters, merge_by_entry
from graftory.compose.merge.sites import LINEAR_METHODS
from graftory.compose.merge.sparsify import Sparsity
from graftory.config import option


@dataclass(frozen=True, slots=True, kw_only=True)
class TiesParameters(EntryParameters):
    """Parameters of `ties` and `magnitude`."""

    density: float = option("share of the entries that is kept", 0.2)

    def sparsity(self, where: str) -> Sparsity:
        """See `EntryParameters`."""
        return Sparsity(self.density, where=where)


def ties(bodies: Sequence[Body], weights: Sequence[float], parameters: TiesParameters) -> Body:
    """Trim, elect, merge (TIES, Yadav et al. 2023, arXiv:2306.01708).

    Of every ΔW_t the entries that are largest in magnitude are kept, a share `density` of each module by itself
    (the paper's code: of all modules together). With the rest at 0: γ = sign(Σ w_t Δ_t), and each entry is
    λ times the mean of the Δ_t whose sign is γ, weighted by |w_t|.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """
    return merge_by_entry(bodies, weights, RECIPES["ties"], parameters)


def magnitude(bodies: Sequence[Body], weights: Sequence[float], parameters: TiesParameters) -> Body:
    """λ Σ w_t trim(Δ_t): the sum of the entries that are largest in magnitude, as `ties` trims, without an election.

    The trimming is that of Han et al. 2015, arXiv:1506.02626.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """
    return merge_by_entry(bodies, weights, RECIPES["magnitude"], parameters)


TIES = MergeMethod(
    name="ties",
    title="TIES (trim, elect sign, merge)",
    paper="https://arxiv.org/abs/2306.01708",
    space="delta",
    accepts=LINEAR_METHODS,
    params=TiesParameters,
    default_weight=lambda _: 1.0,
    fn=ties,
)
MAGNITUDE = MergeMethod(
    name="magnitude",
    title="Magnitude pruning, then the sum",
    paper="https://arxiv.org/abs/1506.02626",
    space="delta",
    accepts=LINEAR_METHODS,
    params=TiesParameters,
    default_weight=lambda n: 1.0 / n,
    fn=magnitude,
)
