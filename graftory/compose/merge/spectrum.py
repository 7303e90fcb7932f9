"""Singular values of updates from their factors: cost O(d R²), never a d x d matrix. All in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftory.compose.merge.base import MergeParameters, check_rank, check_scaling
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.dense import low_rank
from graftory.compose.merge.sites import Site
from graftory.config import option

TOLERANCE = 1e-6
"""Singular values below this share of the largest one are rounding: factors are stored in fp32."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular triplets, the largest first; those that are rounding are left out, so there may be none.

    Attributes:
        u: [d_out, k], orthonormal columns.
        s: [k].
        vt: [k, d_in], orthonormal rows.
    """

    u: Tensor
    s: Tensor
    vt: Tensor

    def first(self, count: int | None) -> Spectrum:
        """The first `count` triplets, or as many as there are."""
        return Spectrum(self.u[:, :count], self.s[:count], self.vt[:count])

    def delta(self) -> Delta:
        """U S Vᵀ as the balanced factors U √S and √S Vᵀ; the same whatever factors it was taken of, up to signs."""
        root = self.s.sqrt()
        return Delta(self.u * root, root[:, None] * self.vt)


def spectrum_of(matrix: Tensor) -> Spectrum:
    """The singular triplets of a small matrix."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    count = int((s > TOLERANCE * s[:1]).sum())
    return Spectrum(u[:, :count], s[:count], vt[:count])


def spectrum(delta: Delta) -> Spectrum:
    """The singular triplets of Q_l R_l (Q_r R_r)ᵀ = left right: those of the core R_l R_rᵀ, at most R x R, turned."""
    q_left, r_left = torch.linalg.qr(delta.left.double())
    q_right, r_right = torch.linalg.qr(delta.right.double().T)
    core = spectrum_of(r_left @ r_right.T)
    return Spectrum(q_left @ core.u, core.s, core.vt @ q_right.T)


def cut(delta: Delta, rank: int | None) -> Delta:
    """The best approximation of an update that has this rank, as balanced factors.

    Args:
        delta: The update, without Δb. One that scales the base's weight is made as a matrix.
        rank: r; with None, or where the factors are no wider, the update stays as it is.
    """
    if rank is None or (delta.rank <= rank and delta.scaling is None):
        return delta
    return spectrum(delta).first(rank).delta() if delta.scaling is None else low_rank(delta.dense(), rank)


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, P Qᵀ of the SVD P D Qᵀ.

    Where columns depend on each other there is no such matrix; then it is the partial isometry: directions
    whose singular value is rounding are left out, as what stands for them would be arbitrary.
    """
    found = spectrum_of(matrix)
    return found.u @ found.vt


@dataclass(frozen=True, slots=True)
class Core:
    """Orthonormal bases in which all updates of a module are small matrices, exactly: Δ_t = left M_t right.

    Attributes:
        left: [d_out, p], p the rank of [B_1 … B_T].
        right: [q, d_in], q the rank of the stacked A_t.
        cores: M_t, [T, p, q].
        spread: How much all adapters together write to each column of `left`, the singular values of [B_1 … B_T], [p].
    """

    left: Tensor
    right: Tensor
    cores: Tensor
    spread: Tensor


def core_of(deltas: Sequence[Delta]) -> Core:
    """The core space of updates (Panariello et al. 2025, arXiv:2509.17786), with bases that belong to the updates.

    The paper takes the left singular vectors of [B_1 … B_T] and the right ones of the stacked A_t, which
    change with how each update is written down (BG, G⁻¹A). Here each is first written as balanced factors
    U_t √S_t and √S_t V_tᵀ, so the bases are the eigenvectors of Σ (Δ_t Δ_tᵀ)^½ and Σ (Δ_tᵀ Δ_t)^½.
    """
    balanced = [spectrum(delta).delta() for delta in deltas]
    left, spread = _basis(torch.cat([delta.left for delta in balanced], dim=1))
    right = _basis(torch.cat([delta.right for delta in balanced], dim=0).T)[0].T
    cores = torch.stack([(left.T @ delta.left) @ (delta.right @ right.T) for delta in balanced])
    return Core(left, right, cores, spread)


def _basis(columns: Tensor) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(columns)
    found = spectrum_of(r)
    return q @ found.u, found.s


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreParameters(MergeParameters):
    """What all merges of singular vectors have."""

    rank: int | None = option("rank of the result; if not given nothing is cut", None)
    scaling: float = option("factor on the merged update", 1.0)

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_scaling(self.scaling)


def merge_in_core(site: Site, rank: int | None, merged: Callable[[Tensor, Sequence[float]], Tensor]) -> Delta:
    """Merge the small matrices of a module's core space and turn the result back.

    Args:
        site: The module.
        rank: Rank to cut the result to; None for all it has.
        merged: Makes one [p, q] of the M_t [T, p, q] and the weights.
    """
    return merge_in(core_of(site.deltas), site.weights, rank, merged)


def merge_in(
    core: Core, weights: Sequence[float], rank: int | None, merged: Callable[[Tensor, Sequence[float]], Tensor]
) -> Delta:
    """The same, in a core space that is there already."""
    if not core.cores.numel():  # no update changes anything
        return Delta(core.left, core.right)
    found = spectrum_of(merged(core.cores, weights)).first(rank).delta()
    return Delta(core.left @ found.left, found.right @ core.right)


def weighted_cores(cores: Tensor, weights: Sequence[float]) -> Tensor:
    """Σ w_t M_t."""
    return torch.einsum("t,tpq->pq", torch.tensor(weights, dtype=cores.dtype), cores)
