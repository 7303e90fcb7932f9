"""`batched_lora` on a GPU: how the kernels are launched."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from graftory.kernels.batched_lora import kernel
from graftory.kernels.batched_lora.gathered import factors, weight_gradient
from graftory.kernels.batched_lora.inputs import Gradients, Inputs, Needed
from graftory.kernels.tiles import Tiles, cut

INTERPRETED = type(kernel.shrink).__name__ == "InterpretedFunction"
"""Whether `TRITON_INTERPRET` was set when the kernels were made: then they run on the CPU, slowly."""
_PROGRAMS = 128
"""From about so many programs on a GPU is busy; below it, sums are split."""


class Blocks(NamedTuple):
    """Sizes of a kernel's blocks: entries, hidden units, columns; and its warps."""

    m: int
    r: int
    d: int
    warps: int


def blocks_for(entries: int, adapters: int, rank: int, dtype: torch.dtype) -> Blocks:
    """Small blocks where an adapter has few entries (decoding), larger ones for prefill.

    From rank 128 on larger ones have too few registers: `tests/test_kernels_compile.py` looks at what is spilled.
    """
    r = max(16, triton.next_power_of_2(rank))
    large = r > 128 or (r == 128 and dtype == torch.float32)
    small = entries <= 32 * min(adapters, entries) or large
    return Blocks(
        m=16 if small else 64,
        r=r,
        d=32 if large else 128 if r <= 32 else 64,
        warps=8 if r > 128 or (r == 128 and not small) else 4,
    )


class _Batch(NamedTuple):
    """A batch as kernels see it.

    Attributes:
        tokens: x, [N T, D_in].
        adapter: Of each entry, [E] with E = N T M.
        factor: f of each entry, [E], fp32.
        ranks: [K], int32.
        tiles: The entries, cut.
        blocks: Sizes.
    """

    tokens: Tensor
    adapter: Tensor
    factor: Tensor
    ranks: Tensor
    tiles: Tiles
    blocks: Blocks


def forward(inputs: Inputs, *, keep: bool) -> tuple[Tensor, Tensor]:
    """As `gathered.forward`; S is [E, R] in fp32, and only made whole if it is to be kept."""
    places, batch = inputs.adapter.shape[1], _batch_of(inputs)
    hidden = _shrink(batch.tokens, inputs.a, batch, places, split=not keep)
    update = _rows(_expand(hidden, inputs.b.transpose(1, 2), batch), inputs.x, places)
    return update, hidden[0] if keep else hidden.new_empty(0)


def backward(grad: Tensor, hidden: Tensor, inputs: Inputs, needed: Needed) -> Gradients:
    """As `gathered.backward`."""
    x, a, b = inputs[:3]
    places, batch = inputs.adapter.shape[1], _batch_of(inputs)
    flat = grad.reshape(-1, grad.shape[-1])
    inner = _shrink(flat, b.transpose(1, 2), batch, places, split=False)
    grad_x = grad_a = grad_b = grad_weight = None
    if needed.x:
        grad_x = _rows(_expand(inner, a, batch), x, places)
    if needed.a:
        grad_a = empty(tuple(a.shape), a.dtype, a.device)
        _outer(inner[0], batch.tokens, grad_a, batch, places)
    if needed.b:
        grad_b = empty(tuple(b.shape), b.dtype, b.device)
        _outer(hidden, flat, grad_b.transpose(1, 2), batch, places)
    if needed.weight:
        unused = (batch.adapter < 0)[:, None]
        rows = [each.masked_fill(unused, 0.0).view(*x.shape[:2], -1) for each in (inner[0], hidden)]
        grad_weight = weight_gradient(rows[0], rows[1], inputs.scale, inputs.adapter)
    return Gradients(grad_x, grad_a, grad_b, grad_weight)


def _batch_of(inputs: Inputs) -> _Batch:
    x, a, _, scale, index, weight, ranks = inputs
    by_row = factors(scale, index, weight, torch.float32)
    adapter, factor = (values.repeat_interleave(x.shape[1], 0).flatten() for values in (index, by_row))
    blocks = blocks_for(len(adapter), a.shape[0], a.shape[1], a.dtype)
    true = torch.full(a.shape[:1], a.shape[1], device=a.device) if ranks is None else ranks
    return _Batch(
        tokens=x.reshape(-1, x.shape[-1]),
        adapter=adapter,
        factor=factor,
        ranks=true.to(torch.int32),
        tiles=cut(adapter, a.shape[0], blocks.m),
        blocks=blocks,
    )


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a kernel to write, all of it."""
    return torch.empty(shape, dtype=dtype, device=device)


def _rows(entries: Tensor, x: Tensor, places: int) -> Tensor:
    """[E, D] as [N, T, D], the places of a token added up in their order."""
    width = entries.shape[-1]
    total = entries if places == 1 else entries.view(len(entries) // places, places, width).sum(1)
    return total.view(*x.shape[:2], width)


def _shrink(x: Tensor, matrix: Tensor, batch: _Batch, places: int, *, split: bool) -> Tensor:
    """S in parts, [parts, E, R] in fp32, for matrices [K, R, D]."""
    tiles, blocks = batch.tiles, batch.blocks
    entries, rank, width = len(tiles.order), matrix.shape[1], matrix.shape[2]
    parts = 1
    if split:
        parts = max(1, min(8, _PROGRAMS // max(1, len(tiles.adapter)), width // (2 * blocks.d)))
    out = empty((parts, entries, rank), torch.float32, x.device)
    if entries:
        kernel.shrink[(len(tiles.adapter), parts)](
            x, matrix, out, tiles.order, tiles.adapter, tiles.start, tiles.end, batch.ranks,
            out.stride(0), width, rank, *x.stride(), *matrix.stride(),
            places=places, parts=parts, block_m=blocks.m, block_r=blocks.r, block_d=blocks.d,
            precision="ieee", upcast=INTERPRETED, num_warps=blocks.warps,
        )  # fmt: skip
    return out


def _expand(hidden: Tensor, matrix: Tensor, batch: _Batch) -> Tensor:
    """[E, D] for parts of S and matrices [K, R, D]; every entry is written."""
    tiles, blocks = batch.tiles, batch.blocks
    parts, entries, rank = hidden.shape
    width = matrix.shape[2]
    out = empty((entries, width), matrix.dtype, matrix.device)
    if entries:
        kernel.expand[(len(tiles.adapter), triton.cdiv(width, blocks.d))](
            hidden, matrix, out, tiles.order, tiles.adapter, tiles.start, tiles.end, batch.ranks, batch.factor,
            hidden.stride(0), width, rank, *matrix.stride(),
            parts=parts, block_m=blocks.m, block_r=blocks.r, block_d=blocks.d,
            precision="ieee", upcast=INTERPRETED, num_warps=blocks.warps, num_stages=1,
        )  # fmt: skip
    return out


def _outer(hidden: Tensor, x: Tensor, out: Tensor, batch: _Batch, places: int) -> None:
    """Fill `out` [K, R, D], in any layout: zeros for adapters without entries and behind a rank."""
    tiles, blocks = batch.tiles, batch.blocks
    adapters, rank, width = out.shape
    columns = triton.cdiv(width, blocks.d)
    parts = max(1, min(8, _PROGRAMS // max(1, adapters * columns), len(tiles.order) // (adapters * 8 * blocks.m)))
    partial = out[None] if parts == 1 else empty((parts, *out.shape), torch.float32, out.device)
    kernel.outer[(adapters, columns, parts)](
        hidden, x, partial, tiles.order, tiles.offsets, batch.ranks, batch.factor,
        width, rank, *x.stride(), *partial.stride(),
        places=places, parts=parts, block_m=blocks.m, block_r=blocks.r, block_d=blocks.d,
        precision="ieee", upcast=INTERPRETED, num_warps=blocks.warps, num_stages=1,
    )  # fmt: skip
    if parts > 1:
        out.copy_(partial.sum(0))
