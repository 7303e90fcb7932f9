"""svd: the best low-rank approximation of the weighted sum, from the factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graftory.compose.merge.base import Body, MergeMethod, MergeParameters, check_rank, check_scaling
from graftory.compose.merge.delta import Delta, total
from graftory.compose.merge.sites import LINEAR_METHODS, Site, merge_sites, summed
from graftory.compose.merge.spectrum import spectrum
from graftory.config import option


@dataclass(frozen=True, slots=True, kw_only=True)
class SvdParameters(MergeParameters):
    """Parameters of `svd`."""

    rank: int | None = option("rank of the result; if not given, the largest of the adapters' at each module", None)
    scaling: float = option("factor on the merged update", 1.0)

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_scaling(self.scaling)


def svd(bodies: Sequence[Body], weights: Sequence[float], parameters: SvdParameters) -> Body:
    """Δ = λ U_r S_r V_rᵀ, the first r singular triplets of Σ w_t Δ_t: no update of rank r is nearer to the sum.

    Eckart and Young 1936, doi:10.1007/BF02288367. The triplets come from the factors: with B = [w_1 B_1, w_2 B_2, …] =
    Q_b R_b and the stacked A ᵀ = Q_a R_a they are those of the small R_b R_aᵀ, turned by Q_b and Q_a. Cost
    O(d (Σ R_t)²) where an SVD of ΔW takes O(d³); the result is the same. What scales the base's weight (DoRA, (IA)³)
    has no factors narrower than the module, so ΔW is made there, and without a rank nothing is cut.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """

    def merged(site: Site) -> Delta:
        whole = total(site.deltas, site.weights)
        own = max(delta.rank for delta in site.deltas) if whole.scaling is None else None
        return spectrum(whole.factored()).first(parameters.rank or own).delta().scaled(parameters.scaling)

    return merge_sites(bodies, weights, merged, vectors=summed(parameters.scaling), factored=False)


SVD = MergeMethod(
    name="svd",
    title="SVD (best low-rank approximation of the sum)",
    paper="https://doi.org/10.1007/BF02288367",
    space="delta",
    accepts=LINEAR_METHODS,
    params=SvdParameters,
    default_weight=lambda n: 1.0 / n,
    fn=svd,
)
