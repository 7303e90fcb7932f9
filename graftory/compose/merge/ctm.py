"""ctm: compress all updates into one pair of subspaces of the rank that is wanted, then merge there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftory.compose.merge.base import Body, MergeMethod
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.dense import stack_of_tensor
from graftory.compose.merge.elementwise import RECIPES, InnerParameters, merge_entries
from graftory.compose.merge.sites import LINEAR_METHODS, Site, averaged, merge_sites
from graftory.compose.merge.spectrum import merge_in_core
from graftory.config import option
from graftory.errors import MergeError

_ROUNDS, _SETTLED = 200, 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class CtmParameters(InnerParameters):
    """Parameters of `ctm`."""

    rank: int | None = option("rank of the result; if not given, the largest of the adapters' at each module", None)
    own_norm: float = option("how far each update keeps its own norm: 1 as it is, 0 the mean of all", 0.25)

    def __post_init__(self) -> None:
        InnerParameters.__post_init__(self)
        if not 0 <= self.own_norm <= 1:
            raise MergeError(f"own_norm: got {self.own_norm:g}, wanted 0 to 1")


def ctm(bodies: Sequence[Body], weights: Sequence[float], parameters: CtmParameters) -> Body:
    """Δ = λ U merge(O_1, …, O_T) Vᵀ with O_t = Uᵀ Δ_t V (Compress then Merge, He et al. 2026, arXiv:2606.03723).

    Each Δ_t is first given the norm β‖Δ_t‖ + (1 − β) mean‖Δ‖, β = own_norm. U [d_out, r] and V [d_in, r] are the bases
    that keep most of all of them, max Σ ‖Uᵀ Δ_t V‖² (Tucker-2, see `shared_bases`), found in the core space. The O_t
    [r, r] are merged by TIES or another `inner` recipe, so the result has rank r without anything cut afterwards.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """

    def merged(site: Site) -> Delta:
        rank = parameters.rank or max(delta.rank for delta in site.deltas)

        def small(cores: Tensor, factors: Sequence[float]) -> Tensor:
            level = _levelled(cores, parameters.own_norm)
            u, v = shared_bases(level, rank)
            recipe, sparsity = RECIPES[parameters.inner], parameters.sparsity(site.path)
            entries = merge_entries(stack_of_tensor(u.T @ level @ v), factors, recipe, sparsity)
            return parameters.scaling * (u @ entries @ v.T)

        return merge_in_core(site, rank, small)

    return merge_sites(bodies, weights, merged, vectors=averaged(parameters.scaling))


def _levelled(matrices: Tensor, own: float) -> Tensor:
    norms = matrices.flatten(1).norm(dim=1)
    wanted = own * norms + (1 - own) * norms.mean()
    return matrices * torch.where(norms > 0, wanted / norms, 0)[:, None, None]


def shared_bases(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal U, V with the largest Σ ‖Uᵀ M_t V‖², by turns from the leading eigenvectors (HOOI).

    De Lathauwer et al. 2000, doi:10.1137/S0895479898346995. It is done when a round adds less than 1e-12 of it, or
    after 200 rounds. Each basis is that of eigenvectors, largest eigenvalue first, so it is the same up to signs.

    Args:
        matrices: [T, p, q].
        rank: Columns of both, or p and q where those are fewer.

    Returns:
        U [p, r] and V [q, r].
    """
    u = _leading(matrices, rank)
    kept = 0.0
    for _ in range(_ROUNDS):
        v = _leading((u.T @ matrices).mT, rank)
        u = _leading(matrices @ v, rank)
        before, kept = kept, float((u.T @ matrices @ v).square().sum())
        if kept - before <= _SETTLED * kept:
            break
    return u, v


def _leading(matrices: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of [M_1 | … | M_T]."""
    found: Tensor = torch.linalg.svd(torch.cat(list(matrices), dim=1), full_matrices=False)[0]
    return found[:, :rank]


CTM = MergeMethod(
    name="ctm",
    title="CtM (compress into shared subspaces, then TIES)",
    paper="https://arxiv.org/abs/2606.03723",
    space="delta",
    accepts=LINEAR_METHODS,
    params=CtmParameters,
    default_weight=lambda _: 1.0,
    fn=ctm,
)
