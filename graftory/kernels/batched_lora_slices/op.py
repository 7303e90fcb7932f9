"""`batched_lora_slices` as one operation: for autograd in eager mode, and for compilers as one node with its shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftory.kernels.backend import learns
from graftory.kernels.batched_lora.inputs import Gradients, Inputs, Needed
from graftory.kernels.batched_lora_slices import gathered
from graftory.kernels.routing import Routing


def run_forward(
    inputs: Inputs, widths: list[int], routing: Routing, backend: str, *, keep: bool
) -> tuple[Tensor, Tensor]:
    """The updates, and what the backward needs of them."""
    if backend == "torch":
        return gathered.forward(inputs, widths, routing)
    from graftory.kernels.batched_lora_slices import launch

    return launch.forward(inputs, widths, routing, keep=keep)


def run_backward(
    grad: Tensor, hidden: Tensor, inputs: Inputs, widths: list[int], routing: Routing, backend: str, needed: Needed
) -> Gradients:
    """Gradients of x, a, b and weight."""
    if backend == "torch":
        return gathered.backward(grad, hidden, inputs, widths, routing, needed)
    from graftory.kernels.batched_lora_slices import launch

    return launch.backward(grad, hidden, inputs, widths, routing, needed)


class BatchedLoraSlices(torch.autograd.Function):
    """The operation in eager mode: no detour through the dispatcher, which costs as much as a small product."""

    @staticmethod
    def forward(ctx: Any, widths: list[int], routing: Routing, backend: str, *inputs: Any) -> Tensor:
        """See `batched_lora_slices`; the inputs are those of `Inputs`."""
        keep = any(ctx.needs_input_grad)
        update, hidden = run_forward(Inputs(*inputs), widths, routing, backend, keep=keep)
        if keep:
            ctx.save_for_backward(hidden, *inputs)
            ctx.widths, ctx.routing, ctx.backend = widths, routing, backend
        return update

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `gathered.backward`."""
        hidden, *inputs = ctx.saved_tensors
        _, _, _, x, a, b, _, _, weight, _ = ctx.needs_input_grad
        needed = Needed(x, a, b, weight)
        found = run_backward(grad, hidden, Inputs(*inputs), ctx.widths, ctx.routing, ctx.backend, needed)
        return None, None, None, found.x, found.a, found.b, None, None, found.weight, None


_INPUTS = (
    "Tensor x, Tensor a, Tensor b, Tensor scale, Tensor index, Tensor? weight, Tensor? ranks, int[] widths, str backend"
)


@torch.library.custom_op("graftory::batched_lora_slices", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _op(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, widths, backend = arguments
    inputs = Inputs(*tensors)
    update, hidden = run_forward(inputs, list(widths), Routing(inputs.adapter), backend, keep=True)
    return update.contiguous(), hidden.contiguous()


@_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, _, backend = arguments
    x, a, b, _, index, *_ = Inputs(*inputs)
    (rows, tokens, _), places, (slices, _, rank, _) = x.shape, index.shape[1], a.shape
    update = x.new_empty(rows, tokens, b.shape[1])
    if backend == "torch":
        return update, x.new_empty(slices, rows, places * rank, tokens)
    return update, x.new_empty(slices, rows * tokens * places, rank, dtype=torch.float32)


@torch.library.custom_op(
    "graftory::batched_lora_slices_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor hidden, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(grad: Tensor, hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, widths, backend = arguments
    inputs = Inputs(*tensors)
    needed = Needed(True, True, True, inputs.weight is not None)
    found = run_backward(grad, hidden, inputs, list(widths), Routing(inputs.adapter), backend, needed)
    return tuple(grad.new_empty(0) if each is None else each.contiguous() for each in found)


@_backward_op.register_fake
def _(grad: Tensor, hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    del hidden
    x, a, b, _, _, weight, *_ = arguments
    made = (each.new_empty(each.shape) for each in (x, a, b))
    return *made, grad.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.widths, ctx.backend = inputs
    ctx.save_for_backward(output[1], *tensors)


def _derive(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, *inputs = ctx.saved_tensors
    x, a, b, weight = _backward_op(grad.contiguous(), hidden, *inputs, ctx.widths, ctx.backend)
    return x, a, b, None, None, weight if Inputs(*inputs).weight is not None else None, None, None, None


_op.register_autograd(_derive, setup_context=_keep)


def apply(inputs: Inputs, widths: list[int], routing: Routing, backend: str) -> Tensor:
    """The operation, by the way that suits who calls it; straight to the numbers where nothing learns."""
    if torch.compiler.is_compiling():
        update: Tensor = _op(*inputs, widths, backend)[0]
        return update
    if not learns(inputs):
        return run_forward(inputs, widths, routing, backend, keep=False)[0]
    made: Tensor = BatchedLoraSlices.apply(widths, routing, backend, *inputs)  # type: ignore[no-untyped-call]
    return made
