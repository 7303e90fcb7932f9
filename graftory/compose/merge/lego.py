"""lego: take updates apart into units of rank 1, and put like ones together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftory.compose.merge.base import Body, MergeMethod
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.sites import LINEAR_METHODS, Site, averaged, merge_sites
from graftory.compose.merge.spectrum import CoreParameters, core_of, spectrum_of
from graftory.config import option


@dataclass(frozen=True, slots=True, kw_only=True)
class LegoParameters(CoreParameters):
    """Parameters of `lego`."""

    rank: int | None = option(
        "units of the result; if not given, the largest of the adapters' ranks at each module", None
    )
    reweight: bool = option(
        "give each unit the mean size of those it stands for, and the result the size of one task", True
    )
    seed: int = 0
    """Of the clustering."""


def lego(bodies: Sequence[Body], weights: Sequence[float], parameters: LegoParameters) -> Body:
    """Δ = λ Σ_c n_c û_c over k clusters c of rank-1 units (LoRA-LEGO, Zhao et al. 2024, arXiv:2409.16167).

    Every w_t Δ_t is the sum of its units s_i u_i v_iᵀ. All units of a module are clustered by k-means; what stands for
    a cluster is the best rank-1 approximation of the mean of its units, n_c û_c with ‖û_c‖ = 1. With `reweight`, n_c is
    the mean size of the cluster's units instead (a mean of vectors is shorter than they are), and the sum is multiplied
    by √(r/k), r the mean rank of the updates there: k units that are at right angles are then as large as r are.

    The paper's units are the rows of A beside the columns of B, which depend on how an update is written as B A. Here
    they are the singular triplets, and what is clustered is the products u_i v_iᵀ themselves, which know no sign.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """

    def merged(site: Site) -> Delta:
        core = core_of(site.deltas)
        units, counts = _units(core.cores, site.weights)
        if not len(units):  # no update changes anything
            return Delta(core.left, core.right)
        count = min(parameters.rank or max(counts), len(units))
        chosen = [_centre(units[members], parameters.reweight) for members in _clusters(units, count, parameters.seed)]
        size = math.sqrt(sum(counts) / len(counts) / count) if parameters.reweight else 1.0
        small = spectrum_of(parameters.scaling * size * torch.stack(chosen).sum(0)).delta()
        return Delta(core.left @ small.left, small.right @ core.right)

    return merge_sites(bodies, weights, merged, vectors=averaged(parameters.scaling))


def _units(cores: Tensor, weights: Sequence[float]) -> tuple[Tensor, list[int]]:
    """The rank-1 matrices that the weighted M_t are sums of, [n, p, q], and how many there are of each
    that has any."""
    found, counts = [], []
    for core, weight in zip(cores, weights, strict=True):
        parts = spectrum_of(weight * core)
        counts += [len(parts.s)] if len(parts.s) else []
        found.append(torch.einsum("pk,k,kq->kpq", parts.u, parts.s, parts.vt))
    return torch.cat(found), counts


def _clusters(units: Tensor, count: int, seed: int) -> list[Tensor]:
    """The numbers of the units of each cluster, in order of the first; none is empty."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    if count == len(units):
        return [torch.tensor([number]) for number in range(count)]
    with threadpool_limits(1):
        means: Any = KMeans(count, n_init=10, random_state=seed)
        labels = torch.from_numpy(means.fit_predict(units.flatten(1).numpy()))
    return [(labels == label).nonzero()[:, 0] for label in dict.fromkeys(labels.tolist())]


def _centre(units: Tensor, reweight: bool) -> Tensor:
    """What stands for the units of a cluster, [p, q]."""
    first = spectrum_of(units.mean(0)).first(1)
    if not len(first.s):
        return torch.zeros_like(units[0])
    size = units.flatten(1).norm(dim=1).mean() if reweight else first.s[0]
    return size * first.u @ first.vt


LEGO = MergeMethod(
    name="lego",
    title="LEGO (k-means over units of rank 1)",
    paper="https://arxiv.org/abs/2409.16167",
    space="delta",
    accepts=LINEAR_METHODS,
    params=LegoParameters,
    default_weight=lambda _: 1.0,
    fn=lego,
)
