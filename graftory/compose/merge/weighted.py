"""What methods share that only look for weights: the sum of updates with them."""

from __future__ import annotations

from collections.abc import Sequence

from graftory.compose.merge.base import Body
from graftory.compose.merge.delta import Delta, total
from graftory.compose.merge.sites import Site, merge_sites, summed
from graftory.compose.merge.spectrum import cut


def weighted_sum(bodies: Sequence[Body], weights: Sequence[float], rank: int | None, scaling: float = 1.0) -> Body:
    """Δ = λ Σ w_t Δ_t at every module, cut to the best of a rank if one is given.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """

    def merged(site: Site) -> Delta:
        return cut(total(site.deltas, site.weights), rank).scaled(scaling)

    return merge_sites(bodies, weights, merged, vectors=summed(scaling), factored=False)
