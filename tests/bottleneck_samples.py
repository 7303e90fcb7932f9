"""Batches for the tests of `batched_bottleneck`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graftory.kernels import batched_bottleneck
from graftory.kernels.activations import Activation
from graftory.kernels.backend import Backend
from graftory.kernels.batched_bottleneck.inputs import Inputs
from graftory.kernels.batched_bottleneck.reference import reference
from graftory.kernels.shapes import stack_padded


@dataclass(frozen=True)
class Neck:
    """Inputs of `batched_bottleneck`: x [N, T, D], index [N, M], keep [N, T, M R], and a gradient of what it gives."""

    x: Tensor
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    scale: Tensor
    index: Tensor
    weight: Tensor | None
    keep: Tensor | None
    sizes: Tensor
    grad: Tensor
    activation: Activation

    def to(self, dtype: torch.dtype) -> Neck:
        """With the numbers of another type, rounded once."""
        made: dict[str, Any] = {
            name: each.to(dtype)
            for name, each in self.__dict__.items()
            if isinstance(each, Tensor) and each.is_floating_point() and name != "scale"
        }
        return replace(self, **made)

    def whole(self) -> Neck:
        """Small whole numbers, and nothing but their sums and products: exact in whatever order they are added."""
        names = ("x", "down", "down_bias", "up", "up_bias", "scale", "weight", "keep")
        made = {name: getattr(self, name) for name in names}
        made["down"] = 4 * self.down
        rounded: dict[str, Any] = {name: None if each is None else each.round() for name, each in made.items()}
        return replace(self, **rounded, activation="relu")

    def picked(self, rows: Tensor) -> Neck:
        """Some of the rows."""
        weight, keep = (None if each is None else each[rows] for each in (self.weight, self.keep))
        x, index, grad = (each[rows] for each in (self.x, self.index, self.grad))
        return replace(self, x=x, index=index, grad=grad, weight=weight, keep=keep)

    def renamed(self, order: list[int]) -> Neck:
        """The same with the adapters in another order."""
        back = torch.tensor([*(order.index(k) for k in range(len(order))), -1])
        names = ("down", "down_bias", "up", "up_bias", "scale", "sizes")
        return replace(self, **{name: getattr(self, name)[order] for name in names}, index=back[self.index])

    def leaves(self) -> list[Tensor]:
        """What can learn."""
        every = (self.x, self.down, self.down_bias, self.up, self.up_bias, self.weight)
        return [each for each in every if each is not None]

    def learning(self) -> Neck:
        """Copies that take gradients."""
        names = ("x", "down", "down_bias", "up", "up_bias", "weight")
        copies: dict[str, Any] = {name: getattr(self, name) for name in names}
        copies = {name: each.clone().requires_grad_() for name, each in copies.items() if each is not None}
        return replace(self, **copies)

    def run(self, backend: Backend = "torch") -> Tensor:
        """What is tested."""
        return batched_bottleneck(
            self.x, self.down, self.down_bias, self.up, self.up_bias, self.scale, self.index, self.weight,
            activation=self.activation, keep=self.keep, sizes=self.sizes, backend=backend,
        )  # fmt: skip


def neck(
    index: Sequence[Sequence[int]],
    sizes: Sequence[int],
    activation: Activation = "gelu",
    *,
    tokens: int = 3,
    width: int = 20,
    weighted: bool = False,
    dropped: bool = False,
    seed: int = 0,
) -> Neck:
    """Signed normal numbers in fp64, exactly what they are in fp32."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    places = torch.tensor(index, dtype=torch.long)
    units = (len(index), tokens, places.shape[1] * max(sizes))
    return Neck(
        x=randn(len(index), tokens, width),
        down=stack_padded([randn(size, width) / 4 for size in sizes], 0),
        down_bias=stack_padded([randn(size) for size in sizes], 0),
        up=stack_padded([randn(width, size) for size in sizes], 1),
        up_bias=randn(len(sizes), width),
        scale=randn(len(sizes)),
        index=places,
        weight=randn(*places.shape) if weighted else None,
        keep=(torch.rand(units, generator=generator) > 0.25).double() * 1.25 if dropped else None,
        sizes=torch.tensor(sizes),
        grad=randn(len(index), tokens, width),
        activation=activation,
    )


def results(given: Neck, backend: Backend = "torch") -> list[Tensor]:
    """The update, and the gradients of what can learn."""
    given = given.learning()
    update = given.run(backend)
    return [update.detach(), *torch.autograd.grad(update, given.leaves(), given.grad)]


def expected(given: Neck) -> list[Tensor]:
    """The same by the formula and autograd, in fp64."""
    exact = given.to(torch.float64).learning()
    inputs = Inputs(
        exact.x, exact.down, exact.down_bias, exact.up, exact.up_bias, exact.scale, exact.index, exact.weight,
        exact.keep,
    )  # fmt: skip
    update = reference(inputs, exact.activation)
    found: Sequence[Tensor | None] = [None] * len(exact.leaves())
    if update.requires_grad:  # not if no row has an adapter
        found = torch.autograd.grad(update, exact.leaves(), exact.grad, allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in exact.leaves())
    return [update.detach(), *(zero if each is None else each for each, zero in zip(found, zeros, strict=True))]


EMPTY = neck([[0]], (2, 3))
CASES: dict[str, Neck] = {
    "each its own": neck([[0], [1], [2]], (1, 3, 8)),
    "some none": neck([[2], [-1], [0], [0], [1], [-1], [2]], (4, 17, 16), "relu"),
    "one for all": neck([[0]] * 5, (8,), "silu", dropped=True),
    "one for all weighted": neck([[0]] * 4, (8,), "tanh", weighted=True),
    "one and none": neck([[0], [-1], [0]], (8,), "gelu_new", dropped=True),
    "none at all": neck([[-1], [-1]], (2, 3)),
    "no rows": replace(EMPTY, x=EMPTY.x[:0], index=EMPTY.index[:0], grad=EMPTY.grad[:0]),
    "no tokens": replace(EMPTY, x=EMPTY.x[:, :0], grad=EMPTY.grad[:, :0]),
    "skewed": neck([[1]] * 9 + [[0]], (2, 64, 3), "tanh", tokens=1),
    "mixtures": neck([[0, 2], [1, -1], [-1, -1], [2, 2], [-1, 0]], (2, 5, 3), "gelu", weighted=True, dropped=True),
    "mixtures unweighted": neck([[0, 1, 2], [2, -1, 1]], (2, 5, 3), "silu"),
    "weighted": neck([[1], [0], [-1], [1]], (2, 5), "gelu_new", weighted=True),
    "dropped": neck([[1], [0], [-1], [1]], (2, 5), "relu", dropped=True),
    "many": neck([[k] for k in range(0, 257, 3)], [1 + k % 5 for k in range(257)], "relu", tokens=1, width=8),
}
