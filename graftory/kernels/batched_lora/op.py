"""`batched_lora` as one operation: for autograd in eager mode, and for compilers as one node with its shapes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftory.kernels.backend import learns
from graftory.kernels.batched_lora import gathered
from graftory.kernels.batched_lora.inputs import Gradients, Inputs, Leave, Needed
from graftory.kernels.inlet import Product, leave
from graftory.kernels.routing import Routing

MAX_RANK = 256
"""Of the kernels."""


def run_forward(
    inputs: Inputs, routing: Routing, backend: str, *, keep: bool, onto: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The update, or what it is added to in that one's memory; and what the backward needs of it."""
    if backend == "torch" and onto is not None and onto.dtype != inputs.x.dtype:
        update, hidden = gathered.forward(inputs, routing)
        return onto.add_(update), hidden
    if backend == "torch":
        return gathered.forward(inputs, routing, onto)
    from graftory.kernels.batched_lora import launch

    return launch.forward(inputs, routing, keep=keep, onto=onto)


def run_backward(
    grad: Tensor,
    hidden: Tensor,
    inputs: Inputs,
    routing: Routing,
    backend: str,
    needed: Needed,
    leave: Leave = Product.made,
) -> Gradients:
    """Gradients of x, a, b and weight; what the update was added to, and so its gradient, may have another dtype."""
    if backend == "torch":
        return gathered.backward(grad.to(inputs.a.dtype), hidden, inputs, routing, needed, leave)
    from graftory.kernels.batched_lora import launch

    return launch.backward(grad, hidden, inputs, routing, needed)


class BatchedLora(torch.autograd.Function):
    """The operation in eager mode: no detour through the dispatcher, which costs as much as a small product."""

    @staticmethod
    def forward(ctx: Any, routing: Routing, backend: str, onto: Tensor | None, *inputs: Any) -> Tensor:
        """See `batched_lora`; the inputs are those of `Inputs`."""
        keep = any(ctx.needs_input_grad)
        # to autograd what comes of `onto` is a tensor of its own: what made that does not look at it again
        memory = None if onto is None else onto.detach()
        update, hidden = run_forward(Inputs(*inputs), routing, backend, keep=keep, onto=memory)
        if keep:
            ctx.save_for_backward(hidden, *inputs)
            ctx.routing, ctx.backend = routing, backend
        return update

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `gathered.backward`."""
        hidden, *inputs = ctx.saved_tensors
        _, _, onto, x, a, b, _, _, weight, _ = ctx.needs_input_grad
        needed, way = Needed(x, a, b, weight), partial(leave, inputs[0])
        found = run_backward(grad, hidden, Inputs(*inputs), ctx.routing, ctx.backend, needed, way)
        return None, None, grad if onto else None, found.x, found.a, found.b, None, None, found.weight, None


_INPUTS = "Tensor x, Tensor a, Tensor b, Tensor scale, Tensor index, Tensor? weight, Tensor? ranks, str backend"


@torch.library.custom_op("graftory::batched_lora", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _op(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, backend = arguments
    inputs = Inputs(*tensors)
    update, hidden = run_forward(inputs, Routing(inputs.adapter), backend, keep=True)
    return update.contiguous(), hidden.contiguous()


@_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = arguments
    x, a, b, _, index, *_ = Inputs(*inputs)
    (rows, tokens, _), places, rank = x.shape, index.shape[1], a.shape[1]
    update = a.new_empty(rows, tokens, b.shape[1])
    if backend == "torch":
        return update, x.new_empty(rows, places * rank, tokens)
    return update, x.new_empty(rows * tokens * places, rank, dtype=torch.float32)


@torch.library.custom_op(
    "graftory::batched_lora_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor hidden, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(grad: Tensor, hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, backend = arguments
    inputs = Inputs(*tensors)
    needed = Needed(True, True, True, inputs.weight is not None)
    found = run_backward(grad, hidden, inputs, Routing(inputs.adapter), backend, needed)
    return tuple(grad.new_empty(0) if each is None else each.contiguous() for each in found)


@_backward_op.register_fake
def _(grad: Tensor, hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    del hidden
    x, a, b, _, _, weight, *_ = arguments
    made = (each.new_empty(each.shape) for each in (x, a, b))
    return *made, grad.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(output[1], *tensors)


def _derive(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, *inputs = ctx.saved_tensors
    x, a, b, weight = _backward_op(grad.contiguous(), hidden, *inputs, ctx.backend)
    return x, a, b, None, None, weight if Inputs(*inputs).weight is not None else None, None, None


_op.register_autograd(_derive, setup_context=_keep)


def apply(inputs: Inputs, routing: Routing, backend: str, onto: Tensor | None = None) -> Tensor:
    """The operation, by the way that suits who calls it."""
    if torch.compiler.is_compiling():
        update: Tensor = _op(*inputs, backend)[0]
        return update if onto is None else onto + update.to(onto.dtype)
    if not learns((onto, *inputs)):
        return run_forward(inputs, routing, backend, keep=False, onto=onto)[0]
    made: Tensor = BatchedLora.apply(routing, backend, onto, *inputs)  # type: ignore[no-untyped-call]
    return made
