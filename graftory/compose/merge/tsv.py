"""tsv: the singular vectors of all tasks side by side, made orthogonal to each other (TSV-M)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftory.compose.merge.base import Body, MergeMethod
from graftory.compose.merge.sites import LINEAR_METHODS, averaged, merge_sites
from graftory.compose.merge.spectrum import CoreParameters, merge_in_core, polar, spectrum_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TsvParameters(CoreParameters):
    """Parameters of `tsv`."""


def tsv(bodies: Sequence[Body], weights: Sequence[float], parameters: TsvParameters) -> Body:
    """Δ = λ Û S V̂ᵀ (TSV-M, Gargiulo et al. 2025, arXiv:2412.00081).

    With Δ_t = U_t S_t V_tᵀ: U = [U_1 … U_T], V likewise, S = diag(w_1 S_1, …), and Û = P Qᵀ of the SVD U = P D Qᵀ is
    the orthonormal matrix nearest to U; V̂ likewise. So tasks whose directions overlap no longer interfere. The paper
    keeps the first 1/T of each full-rank task's triplets; of an adapter all are kept, as they are few already. It
    happens in the core space of the module, exactly, with matrices of Σ R_t x Σ R_t.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """

    def merged(cores: Tensor, factors: Sequence[float]) -> Tensor:
        return parameters.scaling * orthogonal_sum(cores, factors)

    return merge_sites(
        bodies, weights, lambda site: merge_in_core(site, parameters.rank, merged), vectors=averaged(parameters.scaling)
    )


def orthogonal_sum(cores: Tensor, weights: Sequence[float]) -> Tensor:
    """Û S V̂ᵀ of matrices [T, p, q]."""
    found = [spectrum_of(core) for core in cores]
    u = torch.cat([one.u for one in found], dim=1)
    v = torch.cat([one.vt for one in found]).T
    s = torch.cat([weight * one.s for one, weight in zip(found, weights, strict=True)])
    return polar(u) * s @ polar(v).T


TSV = MergeMethod(
    name="tsv",
    title="TSV-M (task singular vectors, made orthogonal)",
    paper="https://arxiv.org/abs/2412.00081",
    space="delta",
    accepts=LINEAR_METHODS,
    params=TsvParameters,
    default_weight=lambda _: 1.0,
    fn=tsv,
)
