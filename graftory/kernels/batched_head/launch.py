"""`batched_head` on a GPU: how the kernels are launched, for as many outputs at a time as they take."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from graftory.kernels.batched_head import kernel
from graftory.kernels.batched_head.inputs import Gradients, Inputs, Needed
from graftory.kernels.batched_lora import inputs as lora
from graftory.kernels.batched_lora import launch
from graftory.kernels.routing import Routing

CHUNK = 128
"""Outputs at a time."""


def forward(inputs: Inputs, fill: float) -> Tensor:
    """As `gathered.forward`."""
    rows, tokens, _ = inputs.x.shape
    out = launch.empty((rows * tokens, inputs.weight.shape[1]), inputs.weight.dtype, inputs.x.device)
    for outputs, batch in _chunks(inputs):
        hidden = launch.shrink(batch.tokens, inputs.weight[:, outputs][None], batch, split=True)
        bias = None if inputs.bias is None else inputs.bias[:, outputs]
        _finish(hidden[0], bias, batch, fill, out[:, outputs])
    return out.view(rows, tokens, out.shape[1])


def backward(grad: Tensor, inputs: Inputs, needed: Needed) -> Gradients:
    """As `gathered.backward`."""
    x, weight, bias, *_ = inputs
    one = torch.ones(1, 1, device=x.device).expand(x.shape[0] * x.shape[1], 1)
    grads_x: list[Tensor] = []
    grad_weight = launch.empty(tuple(weight.shape), weight.dtype, weight.device) if needed.weight else None
    grad_bias = launch.empty(tuple(bias.shape), bias.dtype, bias.device) if needed.bias and bias is not None else None
    for outputs, batch in _chunks(inputs):
        inner = grad.reshape(-1, weight.shape[1])[:, outputs].float().contiguous()[None]
        if needed.x:
            # rounded when all outputs are summed
            dtype = weight.dtype if weight.shape[1] <= CHUNK else torch.float32
            grads_x.append(launch.expand(inner[None], weight[:, outputs][None], batch, dtype=dtype))
        if grad_weight is not None:
            launch.outer(inner, batch.tokens, grad_weight[:, outputs][None], batch)
        if grad_bias is not None:
            launch.outer(inner, one, grad_bias[:, outputs, None][None], batch)
    grad_x = None
    if needed.x:
        total = grads_x[0] if len(grads_x) == 1 else torch.stack(grads_x).sum(0).to(weight.dtype)
        grad_x = total.view_as(x)
    return Gradients(grad_x, grad_weight, grad_bias)


def _chunks(inputs: Inputs) -> Iterator[tuple[slice, launch.Batch]]:
    """Some outputs, and the batch with the heads' sizes among them as its ranks."""
    x, weight, _, index, sizes = inputs
    routing = Routing(index)
    scale = torch.ones(len(sizes), device=x.device)
    for first in range(0, weight.shape[1], CHUNK):
        outputs = slice(first, min(first + CHUNK, weight.shape[1]))
        ranks = (sizes - first).clamp(0, outputs.stop - first)
        matrices = weight[:, outputs]
        yield outputs, launch.batch_of(lora.Inputs(x, matrices, matrices, scale, routing.places, None, ranks), routing)


def _finish(hidden: Tensor, bias: Tensor | None, batch: launch.Batch, fill: float, out: Tensor) -> None:
    """Fill `out` [E, O] from parts of the products."""
    parts, entries, width = hidden.shape
    block_r = max(16, triton.next_power_of_2(width))
    block_m = 1024 // block_r
    if entries:
        kernel.finish[(triton.cdiv(entries, block_m),)](
            hidden, bias, out, batch.adapter, batch.ranks, fill,
            entries, width, hidden.stride(0), *((0, 0) if bias is None else bias.stride()), out.stride(0),
            parts=parts, block_m=block_m, block_r=block_r, num_warps=4,
        )  # fmt: skip
