"""pico: hold back the output directions that all tasks share, then merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graftory.compose.merge.base import Body, MergeMethod
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.sites import LINEAR_METHODS, Site, merge_sites, summed
from graftory.compose.merge.spectrum import CoreParameters, core_of, merge_in, weighted_cores
from graftory.compose.merge.tsv import orthogonal_sum
from graftory.config import option


@dataclass(frozen=True, slots=True, kw_only=True)
class PicoParameters(CoreParameters):
    """Parameters of `pico`."""

    sum_by: Literal["linear", "tsv"] = option("how what was held back is merged", "linear")


def pico(bodies: Sequence[Body], weights: Sequence[float], parameters: PicoParameters) -> Body:
    """Δ = λ c merge(U Γ Uᵀ Δ_1, …) with [B_1 … B_T] = U diag(σ) Vᵀ (Pico, arXiv:2604.16826).

    Tang and Yang 2026. Γ = diag(1 / (1 + (T − 1) s_j)) with s_j = σ_j² / Σ σ²: an output direction that many tasks
    write to is held back most. c gives the merged update the mean norm of the Δ_t, so of the weights only their ratios
    matter. The B_t are those of balanced factors U_t √S_t, since others would depend on how an update is written
    down. Merged by the weighted sum, or as `tsv`.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """

    def merged(site: Site) -> Delta:
        core = core_of(site.deltas)
        shares = core.spread.square() / core.spread.square().sum()
        held = core.cores / (1 + (len(core.cores) - 1) * shares)[:, None]

        def small(cores: Tensor, factors: Sequence[float]) -> Tensor:
            way = orthogonal_sum if parameters.sum_by == "tsv" else weighted_cores
            found = way(held, factors)
            norm, wanted = found.norm(), cores.flatten(1).norm(dim=1).mean()
            return parameters.scaling * found * (wanted / norm) if norm > 1e-6 * wanted else torch.zeros_like(found)

        return merge_in(core, site.weights, parameters.rank, small)

    return merge_sites(bodies, weights, merged, vectors=summed(parameters.scaling))


PICO = MergeMethod(
    name="pico",
    title="Pico (shared output directions held back, then the sum)",
    paper="https://arxiv.org/abs/2604.16826",
    space="delta",
    accepts=LINEAR_METHODS,
    params=PicoParameters,
    default_weight=lambda n: 1.0 / n,
    fn=pico,
)
