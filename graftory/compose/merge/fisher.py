"""fisher: a mean of each weight by how much each task's predictions depend on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftory.compose.merge.base import (
    Body,
    MergeMethod,
    MergeParameters,
    Reads,
    check_not_negative,
    check_rank,
    check_scaling,
)
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.dense import Stack, low_rank
from graftory.compose.merge.sites import LINEAR_METHODS, Site, merge_sites
from graftory.config import option
from graftory.errors import MergeError

GRADIENTS, ROWS = "gradients", "rows"
"""What stands behind a module's path in `Body.inputs`, for what is recorded beside the inputs themselves."""

MAX_TOKENS = 4096
"""No more examples are looked at when they have so many tokens together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FisherParameters(MergeParameters):
    """Parameters of `fisher`."""

    rank: int | None = option("rank of the result; if not given nothing is cut, and it is as wide as the module", None)
    scaling: float = option("factor on the merged update", 1.0)

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_scaling(self.scaling)

    @property
    def reads(self) -> Reads:
        """See `MergeParameters`."""
        return "own tasks"

    @property
    def gradients(self) -> bool:
        """See `MergeParameters`."""
        return True


def fisher(bodies: Sequence[Body], weights: Sequence[float], parameters: FisherParameters) -> Body:
    """θ = Σ w_t F_t ⊙ θ_t / Σ w_t F_t, entry by entry (Fisher merging, Matena and Raffel 2022, arXiv:2111.09832).

    θ_t are the weights of the task's model, W + ΔW_t, never the factors: A and B mean nothing by themselves. As W is
    the same for all, Δ = λ Σ w_t F_t ⊙ ΔW_t / Σ w_t F_t. F_t is the diagonal of the Fisher information of that model:
    the mean over its task's examples of (∂ log p(y | x) / ∂W)², y drawn from the model. Biases likewise. The gradient
    by W is Σ g xᵀ over the tokens of an example, so F_t is made of what was recorded, in blocks of rows like ΔW_t; the
    merged matrix alone is there as a whole. Where no F_t is above 0 it is the weighted mean. An adapter that leaves a
    module alone takes no part there.

    Raises:
        MergeError: If a weight is below 0, gradients are missing, all weights are 0 or shapes disagree.
    """
    check_not_negative("fisher", bodies, weights, "they weigh a mean")

    def merged(site: Site) -> Delta:
        records = [_Record.of(body, site.path) for body in site.bodies]
        for record, delta in zip(records, site.deltas, strict=True):
            record.check(site.path, delta.shape)
        half = len(records)

        def rows(start: int, stop: int) -> Tensor:
            fishers = [record.weight(start, stop) for record in records]
            return torch.stack([*(delta.rows(start, stop) for delta in site.deltas), *fishers])

        parts = [
            _mean(block[:half], block[half:], site.weights)
            for block in Stack(2 * half, site.deltas[0].shape, rows).blocks()
        ]
        return low_rank(torch.cat(parts), parameters.rank).scaled(parameters.scaling)

    def vector(site: Site) -> Tensor:
        fishers = torch.stack([_Record.of(body, site.path).bias() for body in site.bodies])
        biases = torch.stack([delta.bias for delta in site.deltas if delta.bias is not None])
        return parameters.scaling * _mean(biases, fishers, site.weights)

    return merge_sites(bodies, weights, merged, vectors=vector, factored=False)


def _mean(values: Tensor, fishers: Tensor, weights: Sequence[float]) -> Tensor:
    """Σ w F v / Σ w F over the first dimension, in float64."""
    factors = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * (values.dim() - 1))
    shares = factors * fishers.double()
    mass = shares.sum(0)
    mean = (shares * values.double()).sum(0) / torch.where(mass > 0, mass, 1)
    plain = (factors * values.double()).sum(0) / factors.sum()
    return torch.where(mass > 0, mean, plain).to(values.dtype)


@dataclass(frozen=True, slots=True)
class _Record:
    """Inputs and gradients of one module, one pair for each example."""

    examples: tuple[tuple[Tensor, Tensor], ...]
    count: int

    @classmethod
    def of(cls, body: Body, path: str) -> _Record:
        names = (path, f"{path}.{GRADIENTS}", f"{path}.{ROWS}")
        if any(name not in body.inputs for name in names):
            raise MergeError(
                f"fisher: needs the gradients of {body.name} at {path}; hub merge records them, and from Python "
                "inputs=record_examples(..., gradients=True)"
            )
        x, g, rows = (body.inputs[name] for name in names)
        order, sizes = torch.unique_consecutive(rows, return_counts=True)
        pairs = zip(x.split(sizes.tolist()), g.split(sizes.tolist()), strict=True)
        return cls(tuple(pairs), int(order.max()) + 1 if len(order) else 1)

    def check(self, path: str, shape: tuple[int, int]) -> None:
        for x, g in self.examples[:1]:
            if (g.shape[1], x.shape[1]) != shape:
                raise MergeError(f"fisher: {path}: gradients of {(g.shape[1], x.shape[1])} for a module of {shape}")

    def weight(self, start: int, stop: int) -> Tensor:
        """Some rows of F, [stop - start, d_in]: the mean of (Σ g xᵀ)² over examples."""
        return self._mean_square(lambda x, g: g[:, start:stop].T @ x)

    def bias(self) -> Tensor:
        """F of the bias, [d_out]."""
        return self._mean_square(lambda _, g: g.sum(0))

    def _mean_square(self, gradient: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        total: Tensor | None = None
        for x, g in self.examples:
            square = gradient(x, g).square_()
            total = square if total is None else total.add_(square)
        if total is None:
            raise MergeError("fisher: no example has a gradient; give others")
        return total / self.count


FISHER = MergeMethod(
    name="fisher",
    title="Fisher merging (each weight by how much predictions depend on it)",
    paper="https://arxiv.org/abs/2111.09832",
    space="delta",
    accepts=LINEAR_METHODS,
    params=FisherParameters,
    default_weight=lambda _: 1.0,
    fn=fisher,
)
