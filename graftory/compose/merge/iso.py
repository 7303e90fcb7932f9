"""iso_c: the sum with all its singular values made equal. iso_cts: the same, with directions of single tasks too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftory.compose.merge.base import Body, MergeMethod
from graftory.compose.merge.sites import LINEAR_METHODS, averaged, merge_sites
from graftory.compose.merge.spectrum import CoreParameters, Spectrum, merge_in_core, polar, spectrum_of, weighted_cores
from graftory.config import option
from graftory.errors import MergeError


@dataclass(frozen=True, slots=True, kw_only=True)
class IsoCParameters(CoreParameters):
    """Parameters of `iso_c`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IsoCtsParameters(CoreParameters):
    """Parameters of `iso_cts`."""

    common: float = option("share of the directions that the sum decides; the others are of single tasks", 0.8)

    def __post_init__(self) -> None:
        CoreParameters.__post_init__(self)
        if not 0 <= self.common <= 1:
            raise MergeError(f"common: got {self.common:g}, wanted 0 to 1: the share of common directions")


def iso_c(bodies: Sequence[Body], weights: Sequence[float], parameters: IsoCParameters) -> Body:
    """Δ = λ σ̄ U Vᵀ, with Σ w_t Δ_t = U S Vᵀ and σ̄ the mean of S (Iso-C, Marczak et al. 2025, arXiv:2502.04959).

    Few strong directions of the sum, which all tasks share, no longer drown those of single tasks. The mean is over
    the k singular values that are not 0: the paper's full-rank models have no others, but k = Σ R_t here. With
    `rank` the first r directions are kept before the mean is taken, as afterwards no direction is before another.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """

    def merged(cores: Tensor, factors: Sequence[float]) -> Tensor:
        found = spectrum_of(weighted_cores(cores, factors)).first(parameters.rank)
        return parameters.scaling * found.s.sum() / max(1, len(found.s)) * (found.u @ found.vt)

    return merge_sites(
        bodies, weights, lambda site: merge_in_core(site, None, merged), vectors=averaged(parameters.scaling)
    )


def iso_cts(bodies: Sequence[Body], weights: Sequence[float], parameters: IsoCtsParameters) -> Body:
    """Δ = λ σ̄ Û V̂ᵀ with directions of the sum and of tasks (Iso-CTS, Marczak et al. 2025, arXiv:2502.04959).

    Of the k directions of Σ w_t Δ_t = U S Vᵀ each of T tasks gets s = round((1 − common) k / T), the sum keeps its
    first c = k − s T. A task's are the first s triplets of what is left of it, w_t Δ_t − U_c U_cᵀ w_t Δ_t. All are put
    side by side and made orthonormal (Û = P Qᵀ of their SVD P D Qᵀ, V̂ likewise); σ̄ is the mean of all k singular
    values. With `rank`, k is at most r.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """

    def merged(cores: Tensor, factors: Sequence[float]) -> Tensor:
        whole = spectrum_of(weighted_cores(cores, factors)).first(parameters.rank)
        count = len(whole.s)
        each = round((1 - parameters.common) * count / len(cores))
        each = min(each, count // len(cores))
        common = whole.first(count - each * len(cores))
        parts = [
            common,
            *(_own(core * factor, common).first(each) for core, factor in zip(cores, factors, strict=True)),
        ]
        u, v = torch.cat([part.u for part in parts], dim=1), torch.cat([part.vt for part in parts]).T
        s = torch.cat([part.s for part in parts])
        if not len(s):  # the updates cancel each other
            return torch.zeros_like(cores[0])
        return parameters.scaling * s.mean() * (polar(u) @ polar(v).T)

    return merge_sites(
        bodies, weights, lambda site: merge_in_core(site, None, merged), vectors=averaged(parameters.scaling)
    )


def _own(matrix: Tensor, common: Spectrum) -> Spectrum:
    """What a task has outside the common directions."""
    return spectrum_of(matrix - common.u @ (common.u.T @ matrix))


ISO_C = MergeMethod(
    name="iso_c",
    title="Iso-C (isotropic merging in the common subspace)",
    paper="https://arxiv.org/abs/2502.04959",
    space="delta",
    accepts=LINEAR_METHODS,
    params=IsoCParameters,
    default_weight=lambda _: 1.0,
    fn=iso_c,
)
ISO_CTS = MergeMethod(
    name="iso_cts",
    title="Iso-CTS (isotropic merging in common and task-specific subspaces)",
    paper="https://arxiv.org/abs/2502.04959",
    space="delta",
    accepts=LINEAR_METHODS,
    params=IsoCtsParameters,
    default_weight=lambda _: 1.0,
    fn=iso_cts,
)
