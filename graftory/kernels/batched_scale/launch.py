"""`batched_scale` on a GPU: how the kernels are launched."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from graftory.kernels.batched_scale import kernel
from graftory.kernels.batched_scale.inputs import Inputs
from graftory.kernels.tiles import cut

INTERPRETED = type(kernel.scale).__name__ == "InterpretedFunction"
"""Whether `TRITON_INTERPRET` was set when the kernels were made: then they run on the CPU, slowly."""
_PROGRAMS = 256
"""From about so many programs on a GPU is busy; below it, sums are split."""


class Blocks(NamedTuple):
    """Sizes of a kernel's blocks: positions, columns."""

    t: int
    d: int


def blocks_for(tokens: int, width: int) -> Blocks:
    """Wide blocks, and of several positions where they are narrow: 2048 numbers, 16 for each thread."""
    d = min(1024, triton.next_power_of_2(max(16, width)))
    return Blocks(min(2048 // d, triton.next_power_of_2(max(1, tokens))), d)


def sum_blocks_for(positions: int, width: int) -> Blocks:
    """Narrow blocks of many positions: a sum has a program for an adapter and some columns, whatever its length."""
    d = min(128, triton.next_power_of_2(max(16, width)))
    return Blocks(min(16, triton.next_power_of_2(max(1, positions))), d)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a kernel to write, all of it."""
    return torch.empty(shape, dtype=dtype, device=device)


def scaled(x: Tensor, vectors: Tensor, index: Tensor) -> Tensor:
    """As `gathered.scaled`."""
    rows, tokens, width = x.shape
    flat, blocks = x.reshape(-1, width), blocks_for(tokens, width)
    out = empty((rows, tokens, width), x.dtype, x.device)
    if out.numel():
        kernel.scale[(rows * triton.cdiv(tokens, blocks.t), triton.cdiv(width, blocks.d))](
            flat, vectors, out, index,
            tokens, width, *flat.stride(), *vectors.stride(),
            block_t=blocks.t, block_d=blocks.d, num_warps=4,
        )  # fmt: skip
    return out


def backward(grad: Tensor, inputs: Inputs, *, x: bool, vectors: bool) -> tuple[Tensor | None, Tensor | None]:
    """As `gathered.backward`."""
    grad_x = scaled(grad, inputs.vectors, inputs.adapter) if x else None
    return grad_x, _grad_vectors(grad, inputs) if vectors else None


def _grad_vectors(grad: Tensor, inputs: Inputs) -> Tensor:
    """Σ dY ⊙ x for each adapter, [K, D], in parts where that is what keeps a GPU busy; zeros without rows."""
    x, vectors, index = inputs
    (rows, tokens, width), adapters = x.shape, len(vectors)
    one, other = grad.reshape(-1, width), x.reshape(-1, width)
    tiles, blocks = cut(index, adapters, rows or 1), sum_blocks_for(rows * tokens, width)
    columns = triton.cdiv(width, blocks.d)
    parts = max(1, min(32, _PROGRAMS // (adapters * columns), rows * tokens // (adapters * 8 * blocks.t)))
    out = empty((adapters, width), vectors.dtype, vectors.device)
    partial = out[None] if parts == 1 else empty((parts, adapters, width), torch.float32, x.device)
    kernel.reduce[(adapters, columns, parts)](
        one, other, partial, tiles.order, tiles.offsets,
        tokens, width, *one.stride(), *other.stride(), partial.stride(0),
        parts=parts, block_t=blocks.t, block_d=blocks.d, num_warps=4,
    )  # fmt: skip
    if parts > 1:
        out.copy_(partial.sum(0))
    return out
