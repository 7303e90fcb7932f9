"""knots: bring the updates into one set of directions by an SVD, merge entry by entry there (KnOTS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graftory.compose.merge.base import Body, MergeMethod
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.dense import stack_of_tensor
from graftory.compose.merge.elementwise import RECIPES, InnerParameters, merge_entries
from graftory.compose.merge.sites import LINEAR_METHODS, Site, averaged, merge_sites
from graftory.compose.merge.spectrum import core_of, cut, spectrum_of


@dataclass(frozen=True, slots=True, kw_only=True)
class KnotsParameters(InnerParameters):
    """Parameters of `knots`."""


def knots(bodies: Sequence[Body], weights: Sequence[float], parameters: KnotsParameters) -> Body:
    """Δ = λ U S merge(V_1ᵀ, …, V_Tᵀ), with [Δ_1 | … | Δ_T] = U S [V_1ᵀ | … | V_Tᵀ] (KnOTS, arXiv:2410.19735).

    Stoica et al. 2024. Each Δ_t is U S V_tᵀ with U and S in common, so entries of the V_tᵀ [k, d_in] mean the
    same for all tasks and can be merged one by one, by TIES as in the paper's KnOTS-TIES or by another `inner`
    recipe. The SVD is that of the core space's [M_1 | … | M_T]; the result has rank k ≤ Σ R_t and no ΔW is made.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """

    def merged(site: Site) -> Delta:
        core = core_of(site.deltas)
        if not core.cores.numel():  # no update changes anything
            return Delta(core.left, core.right)
        found = spectrum_of(torch.cat(list(core.cores), dim=1))
        blocks = found.vt.unflatten(1, (len(site.deltas), -1)).transpose(0, 1) @ core.right
        entries = merge_entries(
            stack_of_tensor(blocks), site.weights, RECIPES[parameters.inner], parameters.sparsity(site.path)
        )
        root = found.s.sqrt()
        delta = Delta(core.left @ found.u * root, root[:, None] * entries)
        return cut(delta, parameters.rank).scaled(parameters.scaling)

    return merge_sites(bodies, weights, merged, vectors=averaged(parameters.scaling))


KNOTS = MergeMethod(
    name="knots",
    title="KnOTS (aligned by an SVD, then TIES)",
    paper="https://arxiv.org/abs/2410.19735",
    space="delta",
    accepts=LINEAR_METHODS,
    params=KnotsParameters,
    default_weight=lambda _: 1.0,
    fn=knots,
)
