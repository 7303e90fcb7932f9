"""Where the gradient of an update meets that of the frozen layer beside it, in one piece of memory.

A layer and its update read the same x, so x has two gradients. Autograd makes both and adds them up: a third tensor of
x's size for what is B's rank wide. Through an inlet the update leaves the factors of its gradient, and they are
multiplied straight onto the layer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A gradient [N, T, D] that has not been multiplied out: left [N, T, R] times right, [N, R, D] or [R, D]."""

    left: Tensor
    right: Tensor

    def made(self) -> Tensor:
        """In memory of its own."""
        return self.left @ self.right

    def onto(self, total: Tensor) -> Tensor:
        """Added to `total`, in its memory."""
        if self.right.dim() == 3:
            return total.baddbmm_(self.left, self.right)
        if total.is_contiguous():
            total.view(-1, total.shape[-1]).addmm_(self.left.flatten(0, 1), self.right)
            return total
        return total.add_(self.made())


class _Inlet(torch.autograd.Function):
    """x itself. Its node in the graph holds what updates have left."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The same numbers."""
        ctx.updates_left = []
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The layer's gradient with all that was left: autograd comes here when all that reads x has been."""
        for going, gradient in ctx.updates_left:
            if going == _pass():  # not of one that ended before it came here
                gradient.onto(grad)
        ctx.updates_left.clear()
        return grad


def inlet(x: Tensor) -> Tensor:
    """x as a linear layer and `batched_lora` should both be given it, so that their gradients meet in one.

    Only for the input of a linear layer: its gradient is written to, and a product is always in memory of its own.
    Where there is nothing to gain it is x.
    """
    if x.device.type != "cpu" or x.dim() != 3 or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    if torch.compiler.is_compiling():
        return x
    entered: Tensor = _Inlet.apply(x)  # type: ignore[no-untyped-call]
    return entered


def leave(x: Tensor, gradient: Product) -> Tensor | None:
    """Leave a gradient of x at its inlet; or multiply it out, if x has come through none."""
    left: list[tuple[int, Product]] | None = getattr(x.grad_fn, "updates_left", None)
    if left is None:
        return gradient.made()
    left.append((_pass(), gradient))
    return None


def _pass() -> int:
    """The number of the backward pass that is going on."""
    number: int = torch._C._current_graph_task_id()
    return number
