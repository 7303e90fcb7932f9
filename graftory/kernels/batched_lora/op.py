"""`batched_lora` as one operation: for autograd in eager mode, and for compilers as one node with its shapes."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftory.kernels.batched_lora import gathered

Backend = Literal["auto", "torch", "triton"]
MAX_RANK = 256
"""Of the kernels."""


def resolved(backend: str, x: Tensor, rank: int) -> str:
    """What runs: Triton where there is a GPU and the rank fits its kernels, else torch's own products.

    Raises:
        ValueError: If Triton is asked for by name where it cannot run.
    """
    fits = rank <= MAX_RANK and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if backend == "auto":
        return "triton" if fits and x.is_cuda and find_spec("triton") else "torch"
    if backend == "triton" and not (fits and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")):
        raise ValueError(
            f"backend 'triton': got {x.dtype} on {x.device.type} and rank {rank}; wanted fp16, bf16 or fp32 on a GPU "
            f"and rank {MAX_RANK} at most; use 'auto'"
        )
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend: got {backend!r}, wanted auto, torch or triton")
    return backend


def run_forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    index: Tensor,
    weight: Tensor | None,
    ranks: Tensor | None,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The update, and what the backward needs of it."""
    if backend == "torch":
        return gathered.forward(x, a, b, scale, index, weight)
    from graftory.kernels.batched_lora import launch

    return launch.forward(x, a, b, scale, index, weight, ranks, keep=keep)


def run_backward(
    grad: Tensor,
    hidden: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    index: Tensor,
    weight: Tensor | None,
    ranks: Tensor | None,
    backend: str,
    needed: tuple[bool, bool, bool, bool],
) -> gathered.Gradients:
    """Gradients of x, a, b and weight."""
    if backend == "torch":
        return gathered.backward(grad, hidden, x, a, b, scale, index, weight, needed)
    from graftory.kernels.batched_lora import launch

    return launch.backward(grad, hidden, x, a, b, scale, index, weight, ranks, needed)


class BatchedLora(torch.autograd.Function):
    """The operation in eager mode: no detour through the dispatcher, which costs as much as a small product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        index: Tensor,
        weight: Tensor | None,
        ranks: Tensor | None,
        backend: str,
    ) -> Tensor:
        """See `batched_lora`."""
        keep = any(ctx.needs_input_grad)
        update, hidden = run_forward(x, a, b, scale, index, weight, ranks, backend, keep)
        if keep:
            ctx.save_for_backward(hidden, x, a, b, scale, index, weight, ranks)
            ctx.backend = backend
        return update

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `gathered.backward`."""
        need = ctx.needs_input_grad
        needed = (need[0], need[1], need[2], need[5])
        hidden, *inputs = ctx.saved_tensors
        x, a, b, scale, index, weight, ranks = inputs
        found = run_backward(grad, hidden, x, a, b, scale, index, weight, ranks, ctx.backend, needed)
        return found.x, found.a, found.b, None, None, found.weight, None, None


@torch.library.custom_op("graftory::batched_lora", mutates_args=())
def _op(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    index: Tensor,
    weight: Tensor | None,
    ranks: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    update, hidden = run_forward(x, a, b, scale, index, weight, ranks, backend, True)
    return update.contiguous(), hidden.contiguous()


@_op.register_fake
def _(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    index: Tensor,
    weight: Tensor | None,
    ranks: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    del scale, weight, ranks
    rows, tokens = x.shape[:2]
    places, rank = index.shape[1], a.shape[1]
    update = x.new_empty(rows, tokens, b.shape[1])
    if backend == "torch":
        return update, x.new_empty(rows, tokens, places * rank)
    return update, x.new_empty(rows * tokens * places, rank, dtype=torch.float32)


@torch.library.custom_op("graftory::batched_lora_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    hidden: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    index: Tensor,
    weight: Tensor | None,
    ranks: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needed = (True, True, True, weight is not None)
    found = run_backward(grad, hidden, x, a, b, scale, index, weight, ranks, backend, needed)
    assert found.x is not None
    assert found.a is not None
    assert found.b is not None
    last = x.new_empty(0) if found.weight is None else found.weight
    return found.x.contiguous(), found.a.contiguous(), found.b.contiguous(), last.contiguous()


@_backward_op.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    index: Tensor,
    weight: Tensor | None,
    ranks: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del grad, hidden, scale, index, ranks, backend
    last = x.new_empty(0) if weight is None else torch.empty_like(weight)
    made = tuple(each.new_empty(each.shape) for each in (x, a, b))
    return made[0], made[1], made[2], last


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(output[1], *tensors)


def _derive(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    weight = ctx.saved_tensors[6]
    found = _backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.backend)
    return found[0], found[1], found[2], None, None, None if weight is None else found[3], None, None


_op.register_autograd(_derive, setup_context=_keep)


def apply(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    index: Tensor,
    weight: Tensor | None,
    ranks: Tensor | None,
    backend: str,
) -> Tensor:
    """The operation for x [N, T, D_in] and index [N, M]."""
    if torch.compiler.is_compiling():
        update: Tensor = _op(x, a, b, scale, index, weight, ranks, backend)[0]
        return update
    made: Tensor = BatchedLora.apply(x, a, b, scale, index, weight, ranks, backend)  # type: ignore[no-untyped-call]
    return made
