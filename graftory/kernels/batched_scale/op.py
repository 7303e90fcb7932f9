"""`batched_scale` as one operation: for autograd in eager mode, and for compilers as one node with its shapes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftory.kernels.backend import learns
from graftory.kernels.batched_scale import gathered
from graftory.kernels.batched_scale.inputs import Inputs


def _path(backend: str) -> ModuleType:
    """The module that has `scaled` and `backward`."""
    if backend == "torch":
        return gathered
    from graftory.kernels.batched_scale import launch

    return launch


class BatchedScale(torch.autograd.Function):
    """The operation in eager mode: no detour through the dispatcher, which costs as much as a small product."""

    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, vectors: Tensor, index: Tensor) -> Tensor:
        """See `batched_scale`."""
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, vectors, index)
            ctx.backend = backend
        made: Tensor = _path(backend).scaled(x, vectors, index)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `gathered.backward`."""
        _, x, vectors, _ = ctx.needs_input_grad
        found = _path(ctx.backend).backward(grad, Inputs(*ctx.saved_tensors), x=x, vectors=vectors)
        return None, *found, None


_INPUTS = "Tensor x, Tensor vectors, Tensor index, str backend"


@torch.library.custom_op("graftory::batched_scale", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _op(x: Tensor, vectors: Tensor, index: Tensor, backend: str) -> Tensor:
    made: Tensor = _path(backend).scaled(x, vectors, index)
    return made.contiguous()


@_op.register_fake
def _(x: Tensor, vectors: Tensor, index: Tensor, backend: str) -> Tensor:
    del vectors, index, backend
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "graftory::batched_scale_backward", mutates_args=(), schema=f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor)"
)
def _backward_op(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = arguments
    grad_x, grad_vectors = _path(backend).backward(grad, Inputs(*inputs), x=True, vectors=True)
    return grad_x.contiguous(), grad_vectors.contiguous()


@_backward_op.register_fake
def _(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    x, vectors, *_ = arguments
    return grad.new_empty(x.shape), vectors.new_empty(vectors.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _derive(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.backend), None, None


_op.register_autograd(_derive, setup_context=_keep)


_learning: Any = BatchedScale.apply


def apply(inputs: Inputs, backend: str) -> Tensor:
    """The operation, by the way that suits who calls it; straight to the numbers where nothing learns."""
    if torch.compiler.is_compiling():
        scaled: Tensor = _op(*inputs, backend)
        return scaled
    made: Tensor = _learning(backend, *inputs) if learns(inputs) else _path(backend).scaled(*inputs)
    return made
