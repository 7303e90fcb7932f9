"""regmean: the update that comes nearest to what each adapter does to its own inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftory.compose.merge.base import Body, MergeMethod, Reads, check_not_negative
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.sites import LINEAR_METHODS, Site, averaged, merge_sites
from graftory.compose.merge.spectrum import CoreParameters, cut
from graftory.config import option
from graftory.errors import MergeError

_RIDGE = 1e-8
"""Share of the mean diagonal that is added to it, so that directions that no input has are no division by zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegmeanParameters(CoreParameters):
    """Parameters of `regmean`."""

    shrink: float = option("factor on what is off the diagonal of the inputs' inner products", 0.9)

    def __post_init__(self) -> None:
        CoreParameters.__post_init__(self)
        if not 0 <= self.shrink <= 1:
            raise MergeError(f"shrink: got {self.shrink:g}, wanted 0 to 1")

    @property
    def reads(self) -> Reads:
        """See `MergeParameters`."""
        return "own tasks"


def regmean(bodies: Sequence[Body], weights: Sequence[float], parameters: RegmeanParameters) -> Body:
    """Δ = λ (Σ w_t Δ_t G_t) (Σ w_t G_t)⁻¹ with G_t the mean of x xᵀ over inputs of task t (RegMean, arXiv:2212.09849).

    Jin et al. 2023. It is the least-squares solution of min Σ w_t mean ‖(Δ − Δ_t) x‖² over the inputs x that each
    adapter reads at the module; G_t is shrunk, with `shrink` on all that is off its diagonal. As factors of rank Σ R_t:
    [L_1 | L_2 | …] and the stacked w_t R_t G_t (Σ w G)⁻¹. It takes two matrices of d_in x d_in at a time.

    Raises:
        MergeError: If a weight is below 0, inputs are missing, all weights are 0 or shapes disagree.
    """
    check_not_negative("regmean", bodies, weights, "they weigh squared errors")

    def merged(site: Site) -> Delta:
        products, whole = [], torch.zeros((), dtype=torch.float64)
        for body, delta, weight in zip(site.bodies, site.deltas, site.weights, strict=True):
            gram = weight * _gram(body, site.path, parameters.shrink)
            products.append(delta.right.double() @ gram)
            whole = whole + gram
        whole.diagonal().add_(_RIDGE * whole.diagonal().mean())
        right = torch.linalg.solve(whole, torch.cat(products).T).T
        left = torch.cat([delta.left for delta in site.deltas], dim=1).double()
        return cut(Delta(left, right), parameters.rank).scaled(parameters.scaling)

    return merge_sites(bodies, weights, merged, vectors=averaged(parameters.scaling))


def _gram(body: Body, path: str, shrink: float) -> Tensor:
    if path not in body.inputs:
        raise MergeError(
            f"regmean: needs the inputs that {body.name} reads at {path}; hub merge records them, and from Python "
            "inputs=record_examples(...)"
        )
    x = body.inputs[path].double()
    gram = x.T @ x / len(x)
    return shrink * gram + (1 - shrink) * gram.diagonal().diag()


REGMEAN = MergeMethod(
    name="regmean",
    title="RegMean (least squares on each task's inputs)",
    paper="https://arxiv.org/abs/2212.09849",
    space="delta",
    accepts=LINEAR_METHODS,
    params=RegmeanParameters,
    default_weight=lambda _: 1.0,
    fn=regmean,
)
