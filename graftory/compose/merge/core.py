"""core: merge entry by entry in the core space, where every update is a small matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from graftory.compose.merge.base import Body, MergeMethod
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.dense import stack_of_tensor
from graftory.compose.merge.elementwise import RECIPES, InnerParameters, merge_entries
from graftory.compose.merge.sites import LINEAR_METHODS, Site, averaged, merge_sites
from graftory.compose.merge.spectrum import merge_in_core


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSpaceParameters(InnerParameters):
    """Parameters of `core`."""


def core(bodies: Sequence[Body], weights: Sequence[float], parameters: CoreSpaceParameters) -> Body:
    """Δ = λ U merge(M_1, …, M_T) Vᵀ with Δ_t = U M_t Vᵀ (Core space, Panariello et al. 2025, arXiv:2509.17786).

    U and V are bases of the columns of all B_t and the rows of all A_t, so every update is a matrix M_t of at most
    Σ R_t x Σ R_t, exactly, for mixed ranks too; the M_t are merged by TIES or another `inner` recipe. The paper's bases
    depend on how each update is written as B A; these do not, see `core_of`. `tsv`, `iso_c` and `iso_cts` give the same
    in this space as outside, and work in it anyway.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """

    def merged(site: Site) -> Delta:
        def small(cores: Tensor, factors: Sequence[float]) -> Tensor:
            recipe, sparsity = RECIPES[parameters.inner], parameters.sparsity(site.path)
            return parameters.scaling * merge_entries(stack_of_tensor(cores), factors, recipe, sparsity)

        return merge_in_core(site, parameters.rank, small)

    return merge_sites(bodies, weights, merged, vectors=averaged(parameters.scaling))


CORE = MergeMethod(
    name="core",
    title="Core space (merged in the bases of all updates)",
    paper="https://arxiv.org/abs/2509.17786",
    space="delta",
    accepts=LINEAR_METHODS,
    params=CoreSpaceParameters,
    default_weight=lambda _: 1.0,
    fn=core,
)
