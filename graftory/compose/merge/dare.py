"""dare: drop entries at random, rescale the rest, add. dare_ties: elect a sign and take the mean instead of adding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graftory.compose.merge.base import Body, MergeMethod
from graftory.compose.merge.elementwise import RECIPES, EntryParameters, merge_by_entry
from graftory.compose.merge.sites import LINEAR_METHODS
from graftory.compose.merge.sparsify import Sparsity
from graftory.config import option


@dataclass(frozen=True, slots=True, kw_only=True)
class DareParameters(EntryParameters):
    """Parameters of `dare` and `dare_ties`."""

    density: float = option("share of the entries that is kept", 0.5)
    seed: int = 0
    """Of what is dropped."""

    def sparsity(self, where: str) -> Sparsity:
        """See `EntryParameters`."""
        return Sparsity(self.density, seed=self.seed, where=where)


def dare(bodies: Sequence[Body], weights: Sequence[float], parameters: DareParameters) -> Body:
    """λ Σ w_t m_t ⊙ Δ_t / (1 − p), m_t ~ Bernoulli(1 − p) for each entry (DARE, Yu et al. 2024, arXiv:2311.03099).

    density = 1 − p. The masks depend on the seed, the module and the adapter's place among those that sit there, not
    on the update. Over seeds the mean is that of `linear`.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """
    return merge_by_entry(bodies, weights, RECIPES["dare"], parameters)


def dare_ties(bodies: Sequence[Body], weights: Sequence[float], parameters: DareParameters) -> Body:
    """Drop and rescale as `dare`, then elect and merge as `ties` (Yu et al. 2024, arXiv:2311.03099).

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """
    return merge_by_entry(bodies, weights, RECIPES["dare_ties"], parameters)


DARE = MergeMethod(
    name="dare",
    title="DARE (drop and rescale, then the sum)",
    paper="https://arxiv.org/abs/2311.03099",
    space="delta",
    accepts=LINEAR_METHODS,
    params=DareParameters,
    default_weight=lambda n: 1.0 / n,
    fn=dare,
)
DARE_TIES = MergeMethod(
    name="dare_ties",
    title="DARE, then TIES",
    paper="https://arxiv.org/abs/2311.03099",
    space="delta",
    accepts=LINEAR_METHODS,
    params=DareParameters,
    default_weight=lambda _: 1.0,
    fn=dare_ties,
)
