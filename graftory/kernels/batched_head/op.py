"""`batched_head` as one operation: for autograd in eager mode, and for compilers as one node with its shapes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftory.kernels.backend import learns
from graftory.kernels.batched_head import gathered
from graftory.kernels.batched_head.inputs import Inputs, Needed


def _path(backend: str) -> ModuleType:
    """The module that has `forward` and `backward`."""
    if backend == "torch":
        return gathered
    from graftory.kernels.batched_head import launch

    return launch


class BatchedHead(torch.autograd.Function):
    """The operation in eager mode: no detour through the dispatcher, which costs as much as a small product."""

    @staticmethod
    def forward(ctx: Any, fill: float, backend: str, *inputs: Any) -> Tensor:
        """See `batched_head`; the inputs are those of `Inputs`."""
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*inputs)
            ctx.backend = backend
        logits: Tensor = _path(backend).forward(Inputs(*inputs), fill)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `gathered.backward`."""
        _, _, *needed, _, _ = ctx.needs_input_grad
        found = _path(ctx.backend).backward(grad, Inputs(*ctx.saved_tensors), Needed(*needed))
        return None, None, *found, None, None


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor sizes"


@torch.library.custom_op(
    "graftory::batched_head", mutates_args=(), schema=f"({_INPUTS}, float fill, str backend) -> Tensor"
)
def _op(*arguments: Any) -> Tensor:
    *inputs, fill, backend = arguments
    logits: Tensor = _path(backend).forward(Inputs(*inputs), fill)
    return logits.contiguous()


@_op.register_fake
def _(*arguments: Any) -> Tensor:
    x, weight, *_ = arguments
    made: Tensor = x.new_empty(*x.shape[:2], weight.shape[1])
    return made


@torch.library.custom_op(
    "graftory::batched_head_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, str backend) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, backend = arguments
    inputs = Inputs(*tensors)
    found = _path(backend).backward(grad, inputs, Needed(True, True, inputs.bias is not None))
    return tuple(grad.new_empty(0) if each is None else each.contiguous() for each in found)


@_backward_op.register_fake
def _(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    made = arguments[:3]
    return tuple(grad.new_empty(0) if each is None else each.new_empty(each.shape) for each in made)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _derive(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = _backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.backend)
    return x, weight, None if ctx.saved_tensors[2] is None else bias, None, None, None, None


_op.register_autograd(_derive, setup_context=_keep)


_learning: Any = BatchedHead.apply


def apply(inputs: Inputs, fill: float, backend: str) -> Tensor:
    """The operation, by the way that suits who calls it; straight to the numbers where nothing learns."""
    if torch.compiler.is_compiling():
        logits: Tensor = _op(*inputs, fill, backend)
        return logits
    made: Tensor = _learning(fill, backend, *inputs) if learns(inputs) else _path(backend).forward(inputs, fill)
    return made
