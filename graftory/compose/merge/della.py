"""della: drop entries at random, small ones more often, rescale, elect a sign, take the mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graftory.compose.merge.base import Body, MergeMethod
from graftory.compose.merge.elementwise import RECIPES, EntryParameters, merge_by_entry
from graftory.compose.merge.sites import LINEAR_METHODS
from graftory.compose.merge.sparsify import Sparsity
from graftory.config import option


@dataclass(frozen=True, slots=True, kw_only=True)
class DellaParameters(EntryParameters):
    """Parameters of `della`."""

    density: float = option("share of the entries that is kept", 0.5)
    window: float = option("chances to be kept lie this wide about the density, by rank in the row", 0.2)
    seed: int = 0
    """Of what is dropped."""

    def sparsity(self, where: str) -> Sparsity:
        """See `EntryParameters`."""
        return Sparsity(self.density, self.window, self.seed, where)


def della(bodies: Sequence[Body], weights: Sequence[float], parameters: DellaParameters) -> Body:
    """Drop by rank, elect, fuse (DELLA, Deep et al. 2024, arXiv:2406.11617).

    An entry whose magnitude has rank i of n in its row of ΔW_t, from 0 for the smallest, is kept with probability
    q_i = density + window (i / (n − 1) − 1/2) and divided by it. Then as `ties`. The window is the paper's ε;
    with 0 it is `dare_ties`.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """
    return merge_by_entry(bodies, weights, RECIPES["della"], parameters)


DELLA = MergeMethod(
    name="della",
    title="DELLA (drop by magnitude, elect, fuse)",
    paper="https://arxiv.org/abs/2406.11617",
    space="delta",
    accepts=LINEAR_METHODS,
    params=DellaParameters,
    default_weight=lambda _: 1.0,
    fn=della,
)
