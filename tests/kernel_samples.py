"""Batches for the tests of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graftory.kernels.batched_lora.reference import reference
from graftory.kernels.shapes import stack_padded


@dataclass(frozen=True)
class Batch:
    """Inputs of `batched_lora`: x [N, T, D], index [N, M]."""

    x: Tensor
    a: Tensor
    b: Tensor
    scale: Tensor
    index: Tensor
    weight: Tensor | None
    ranks: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        """With the numbers of another type, rounded once."""
        weight = None if self.weight is None else self.weight.to(dtype)
        return replace(self, x=self.x.to(dtype), a=self.a.to(dtype), b=self.b.to(dtype), weight=weight)

    def leaves(self) -> list[Tensor]:
        """What can learn."""
        return [each for each in (self.x, self.a, self.b, self.weight) if each is not None]

    def nan_behind_ranks(self) -> Batch:
        """NaN in the padding, where true ranks are all that may be read."""
        a, b = self.a.clone(), self.b.clone()
        for k, rank in enumerate(self.ranks.tolist()):
            a[k, rank:] = float("nan")
            b[k, :, rank:] = float("nan")
        return replace(self, a=a, b=b)

    def learning(self) -> Batch:
        """Copies that take gradients."""
        copy = replace(self, x=self.x.clone(), a=self.a.clone(), b=self.b.clone())
        copy = replace(copy, weight=None if self.weight is None else self.weight.clone())
        for leaf in copy.leaves():
            leaf.requires_grad_()
        return copy


def batch(
    index: Sequence[Sequence[int]],
    ranks: Sequence[int],
    *,
    tokens: int = 3,
    inputs: int = 24,
    outputs: int = 20,
    weighted: bool = False,
    seed: int = 0,
) -> Batch:
    """Signed normal numbers in fp64, exactly what they are in fp32."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    places = torch.tensor(index, dtype=torch.long)
    return Batch(
        x=randn(len(index), tokens, inputs),
        a=stack_padded([randn(rank, inputs) for rank in ranks], 0),
        b=stack_padded([randn(outputs, rank) for rank in ranks], 1),
        scale=randn(len(ranks)),
        index=places,
        weight=randn(*places.shape) if weighted else None,
        ranks=torch.tensor(ranks),
    )


def expected(given: Batch, grad: Tensor | None = None) -> list[Tensor]:
    """The update in fp64, and with `grad` the gradients of what can learn."""
    exact = given.to(torch.float64).learning()
    update = reference(exact.x, exact.a, exact.b, exact.scale, exact.index, exact.weight)
    if grad is None:
        return [update.detach()]
    reached = update.requires_grad  # not if no row has an adapter
    found: Sequence[Tensor | None] = [None] * len(exact.leaves())
    if reached:
        found = torch.autograd.grad(update, exact.leaves(), grad.double(), allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in exact.leaves())
    return [update.detach(), *(zero if each is None else each for each, zero in zip(found, zeros, strict=True))]


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; of the difference alone where that is 0."""
    size = float(want.double().norm())
    return float((got.double() - want.double()).norm()) / (size or 1.0)
