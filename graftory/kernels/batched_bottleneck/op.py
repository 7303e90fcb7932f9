"""`batched_bottleneck` as one operation: for autograd in eager mode, and for compilers as one node with its shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftory.kernels.backend import learns
from graftory.kernels.batched_bottleneck import gathered
from graftory.kernels.batched_bottleneck.inputs import Gradients, Inputs, Needed
from graftory.kernels.routing import Routing

MAX_SIZE = 256
"""Most hidden units of an adapter that the kernels take."""


def run_forward(
    inputs: Inputs, activation: str, routing: Routing, backend: str, *, keep: bool
) -> tuple[Tensor, Tensor]:
    """The update, and what the backward needs of it."""
    if backend == "torch":
        return gathered.forward(inputs, activation, routing)
    from graftory.kernels.batched_bottleneck import launch

    return launch.forward(inputs, activation, routing, keep=keep)


def run_backward(
    grad: Tensor, before: Tensor, inputs: Inputs, activation: str, routing: Routing, backend: str, needed: Needed
) -> Gradients:
    """The gradients that are needed."""
    if backend == "torch":
        return gathered.backward(grad, before, inputs, activation, routing, needed)
    from graftory.kernels.batched_bottleneck import launch

    return launch.backward(grad, before, inputs, activation, routing, needed)


class BatchedBottleneck(torch.autograd.Function):
    """The operation in eager mode: no detour through the dispatcher, which costs as much as a small product."""

    @staticmethod
    def forward(ctx: Any, activation: str, routing: Routing, backend: str, *inputs: Any) -> Tensor:
        """See `batched_bottleneck`; the inputs are those of `Inputs`."""
        update, before = run_forward(Inputs(*inputs), activation, routing, backend, keep=True)
        ctx.save_for_backward(before, *inputs)
        ctx.how = activation, routing, backend
        return update

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `gathered.backward`."""
        before, *inputs = ctx.saved_tensors
        x, down, down_bias, up, up_bias, _, _, weight, _, _ = ctx.needs_input_grad[3:]
        needed = Needed(x, down, down_bias, up, up_bias, weight)
        activation, routing, backend = ctx.how
        found = run_backward(grad, before, Inputs(*inputs), activation, routing, backend, needed)
        return None, None, None, *found[:5], None, None, found.weight, None, None


_INPUTS = (
    "Tensor x, Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, Tensor scale, Tensor index, Tensor? weight, "
    "Tensor? keep, Tensor? sizes, str activation, str backend"
)


@torch.library.custom_op("graftory::batched_bottleneck", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _op(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, activation, backend = arguments
    inputs = Inputs(*tensors)
    update, before = run_forward(inputs, activation, Routing(inputs.adapter), backend, keep=True)
    return update.contiguous(), before.contiguous()


@_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, _, backend = arguments
    x, down, *_, index, _, _, _ = Inputs(*inputs)
    (rows, tokens, _), places, size = x.shape, index.shape[1], down.shape[1]
    update = x.new_empty(x.shape)
    if backend == "torch":
        return update, x.new_empty(rows, tokens, places * size)
    return update, x.new_empty(rows * tokens * places, size, dtype=torch.float32)


@torch.library.custom_op(
    "graftory::batched_bottleneck_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor before, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(grad: Tensor, before: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, activation, backend = arguments
    inputs = Inputs(*tensors)
    needed = Needed(True, True, True, True, True, inputs.weight is not None)
    found = run_backward(grad, before, inputs, activation, Routing(inputs.adapter), backend, needed)
    return tuple(grad.new_empty(0) if each is None else each.contiguous() for each in found)


@_backward_op.register_fake
def _(grad: Tensor, before: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    del before
    *learning, _, _, weight, _, _, _, _ = arguments
    made = (each.new_empty(each.shape) for each in learning)
    return *made, grad.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, activation, backend = inputs
    ctx.names = activation, backend
    ctx.save_for_backward(output[1], *tensors)


def _derive(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    before, *tensors = ctx.saved_tensors
    *found, weight = _backward_op(grad.contiguous(), before, *tensors, *ctx.names)
    weighted = Inputs(*tensors).weight is not None
    return *found, None, None, weight if weighted else None, None, None, None, None


_op.register_autograd(_derive, setup_context=_keep)


def apply(inputs: Inputs, activation: str, routing: Routing, backend: str) -> Tensor:
    """The operation, by the way that suits who calls it; straight to the numbers where nothing learns."""
    if torch.compiler.is_compiling():
        update: Tensor = _op(*inputs, activation, backend)[0]
        return update
    if not learns(inputs):
        return run_forward(inputs, activation, routing, backend, keep=False)[0]
    made: Tensor = BatchedBottleneck.apply(activation, routing, backend, *inputs)  # type: ignore[no-untyped-call]
    return made
