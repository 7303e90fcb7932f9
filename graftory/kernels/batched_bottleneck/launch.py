"""`batched_bottleneck` on a GPU: how the kernels are launched."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from graftory.kernels.batched_bottleneck import kernel
from graftory.kernels.batched_bottleneck.inputs import Gradients, Inputs, Needed
from graftory.kernels.gather import factors, of_places
from graftory.kernels.routing import Routing
from graftory.kernels.tiles import Tiles

INTERPRETED = type(kernel.shrink).__name__ == "InterpretedFunction"
"""Whether `TRITON_INTERPRET` was set when the kernels were made: then they run on the CPU, slowly."""
_PROGRAMS = 128
"""From about so many programs on a GPU is busy; below it, sums are split."""


class Blocks(NamedTuple):
    """Sizes of the kernels' blocks, and their warps.

    Attributes:
        m: Entries.
        r: Hidden units, all of an adapter.
        k: Hidden units at a time, where they are summed over.
        d: Columns.
        e: Entries at a time, where they are summed over.
        warps: Of 32 threads.
    """

    m: int
    r: int
    k: int
    d: int
    e: int
    warps: int


def blocks_for(entries: int, adapters: int, size: int, dtype: torch.dtype) -> Blocks:
    """Small blocks where an adapter has few entries (decoding), larger ones for prefill.

    From 128 hidden units on, and in fp32, larger ones have too few registers: `tests/test_kernels_compile.py` looks
    at what is spilled.
    """
    full = dtype == torch.float32
    r = max(16, triton.next_power_of_2(size))
    large = r > 128 or (r == 128 and full)
    m = 16 if large or entries <= 32 * min(adapters, entries) else 64
    return Blocks(
        m=m,
        r=r,
        k=min(r, 32 if full else 64),
        d=32 if large else 128 if r <= 32 else 64,
        e=min(m, 32) if r >= 128 or full else m,
        warps=8 if r >= 128 else 4,
    )


class _Batch(NamedTuple):
    """A batch as kernels see it.

    Attributes:
        tokens: x, [N T, D].
        adapter: Of each entry, [E] with E = N T M.
        factor: f of each entry, [E], fp32.
        keep: Multipliers of the hidden units of each entry, [E, R], or None.
        sizes: [K], int32.
        tiles: The entries, cut.
        blocks: Sizes of blocks.
        places: M.
        activation: Its name.
    """

    tokens: Tensor
    adapter: Tensor
    factor: Tensor
    keep: Tensor | None
    sizes: Tensor
    tiles: Tiles
    blocks: Blocks
    places: int
    activation: str


def forward(inputs: Inputs, activation: str, routing: Routing, *, keep: bool) -> tuple[Tensor, Tensor]:
    """As `gathered.forward`; Z is [E, R] in fp32, and only made whole if it is to be kept."""
    batch = _batch_of(inputs, activation, routing)
    before = _shrink(inputs.down, inputs.down_bias, batch, split=not keep)
    update = _rows(_expand(before, inputs.up.transpose(1, 2), inputs.up_bias, batch), inputs.x, batch.places)
    return update, before[0] if keep else before.new_empty(0)


def backward(
    grad: Tensor, before: Tensor, inputs: Inputs, activation: str, routing: Routing, needed: Needed
) -> Gradients:
    """As `gathered.backward`."""
    x, down, _, up, _, scale, index, *_ = inputs
    batch = _batch_of(inputs, activation, routing)
    flat = grad.reshape(-1, grad.shape[-1])
    grad_x = grad_down = grad_down_bias = grad_up = grad_up_bias = grad_weight = None
    if needed.x or needed.down or needed.down_bias or needed.weight:
        outer, products = _inner(flat, before, inputs, batch, weighted=needed.weight)
        if needed.weight:
            by_row = products.masked_fill(batch.adapter < 0, 0.0).view(*x.shape[:2], batch.places).sum(1)
            grad_weight = by_row * of_places(scale, index).to(by_row.dtype)
        if needed.x:
            grad_x = _rows(_expand(outer[None], down, None, batch), x, batch.places)
        if needed.down or needed.down_bias:
            grad_down, grad_down_bias = _outer(outer, batch.tokens, down, batch, by_column=False)
    if needed.up or needed.up_bias:
        grad_up, grad_up_bias = _outer(before, flat, up.transpose(1, 2), batch, by_column=True)
        grad_up = grad_up.transpose(1, 2)
    return Gradients(grad_x, grad_down, grad_down_bias, grad_up, grad_up_bias, grad_weight)


def _batch_of(inputs: Inputs, activation: str, routing: Routing) -> _Batch:
    x, down, _, _, _, scale, index, weight, keep, sizes = inputs
    by_row = factors(scale, index, weight, torch.float32)
    adapter = routing.entries(x.shape[1])
    factor = by_row[:, None].expand(-1, x.shape[1], -1).flatten()
    blocks = blocks_for(len(adapter), down.shape[0], down.shape[1], down.dtype)
    true = torch.full(down.shape[:1], down.shape[1], device=down.device) if sizes is None else sizes
    return _Batch(
        tokens=x.reshape(-1, x.shape[-1]),
        adapter=adapter,
        factor=factor,
        keep=None if keep is None else keep.reshape(len(adapter), down.shape[1]).contiguous(),
        sizes=true.to(torch.int32),
        tiles=routing.tiles(x.shape[1], down.shape[0], blocks.m),
        blocks=blocks,
        places=index.shape[1],
        activation=activation,
    )


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a kernel to write, all of it."""
    return torch.empty(shape, dtype=dtype, device=device)


def _rows(entries: Tensor, x: Tensor, places: int) -> Tensor:
    """[E, D] as [N, T, D], the places of a token added up in their order."""
    width = entries.shape[-1]
    total = entries if places == 1 else entries.view(len(entries) // places, places, width).sum(1)
    return total.view(*x.shape[:2], width)


def _shrink(matrix: Tensor, bias: Tensor, batch: _Batch, *, split: bool) -> Tensor:
    """Z in parts, [parts, E, R] in fp32, for matrices [K, R, D] and biases [K, R]."""
    tiles, blocks, x = batch.tiles, batch.blocks, batch.tokens
    entries, size, width = len(tiles.order), matrix.shape[1], matrix.shape[2]
    parts = 1
    if split:
        parts = max(1, min(8, _PROGRAMS // max(1, len(tiles.adapter)), width // (2 * blocks.d)))
    out = empty((parts, entries, size), torch.float32, x.device)
    if entries:
        kernel.shrink[(len(tiles.adapter), parts)](
            x, matrix, bias.contiguous(), out, tiles.order, tiles.adapter, tiles.start, tiles.end, batch.sizes,
            out.stride(0), width, size, *x.stride(), *matrix.stride(),
            places=batch.places, parts=parts, block_m=blocks.m, block_r=blocks.r, block_d=blocks.d,
            precision="ieee", upcast=INTERPRETED, num_warps=blocks.warps,
        )  # fmt: skip
    return out


def _inner(grad: Tensor, before: Tensor, inputs: Inputs, batch: _Batch, *, weighted: bool) -> tuple[Tensor, Tensor]:
    """dZ without its factor, [E, R] in fp32, and if `weighted` the products of `kernel.inner`, [E]."""
    tiles, blocks, matrix = batch.tiles, batch.blocks, inputs.up.transpose(1, 2)
    entries, size, width = len(tiles.order), matrix.shape[1], matrix.shape[2]
    out = empty((entries, size), torch.float32, grad.device)
    products = empty((entries if weighted else 0,), torch.float32, grad.device)
    if entries:
        kernel.inner[(len(tiles.adapter),)](
            grad, matrix, inputs.up_bias.contiguous(), before, batch.keep, out, products,
            tiles.order, tiles.adapter, tiles.start, tiles.end, batch.sizes,
            width, size, *grad.stride(), *matrix.stride(),
            activation=batch.activation, kept=batch.keep is not None, weighted=weighted, places=batch.places,
            block_m=blocks.m, block_r=blocks.r, block_d=blocks.d,
            precision="ieee", upcast=INTERPRETED, num_warps=blocks.warps,
        )  # fmt: skip
    return out, products


def _expand(hidden: Tensor, matrix: Tensor, bias: Tensor | None, batch: _Batch) -> Tensor:
    """[E, D] for parts of Z and matrices [K, R, D]; every entry is written. Without a bias, for dX, just a product."""
    tiles, blocks, keep = batch.tiles, batch.blocks, None if bias is None else batch.keep
    parts, entries, size = hidden.shape
    width = matrix.shape[2]
    out = empty((entries, width), matrix.dtype, matrix.device)
    if entries:
        kernel.expand[(len(tiles.adapter), triton.cdiv(width, blocks.d))](
            hidden, matrix, None if bias is None else bias.contiguous(), keep, out,
            tiles.order, tiles.adapter, tiles.start, tiles.end, batch.sizes, batch.factor,
            hidden.stride(0), width, size, *matrix.stride(),
            activation="" if bias is None else batch.activation, kept=keep is not None, biased=bias is not None,
            parts=parts, block_m=blocks.m, block_k=blocks.k, block_d=blocks.d,
            precision="ieee", upcast=INTERPRETED, num_warps=blocks.warps, num_stages=1,
        )  # fmt: skip
    return out


def _outer(hidden: Tensor, x: Tensor, like: Tensor, batch: _Batch, *, by_column: bool) -> tuple[Tensor, Tensor]:
    """dU [K, R, D] and de [K, D] from Z and dY if `by_column`, else dD [K, R, D] and dc [K, R] from dZ and x.

    Zeros for adapters without entries and behind a size.
    """
    tiles, blocks, keep = batch.tiles, batch.blocks, batch.keep if by_column else None
    adapters, size, width = like.shape
    columns = triton.cdiv(width, blocks.d)
    parts = max(1, min(8, _PROGRAMS // max(1, adapters * columns), len(tiles.order) // (adapters * 8 * blocks.e)))
    dtype = like.dtype if parts == 1 else torch.float32
    # [K, D, R] in memory for dU, which is handed on as such
    shape = (parts, adapters, width, size) if by_column else (parts, adapters, size, width)
    out = empty(shape, dtype, x.device)
    strided = out.transpose(2, 3) if by_column else out
    sums = empty((parts, adapters, width if by_column else size), dtype, x.device)
    kernel.outer[(adapters, columns, parts)](
        hidden, keep, x, strided, sums, tiles.order, tiles.offsets, batch.sizes, batch.factor,
        width, size, *x.stride(), *strided.stride(), sums.stride(0),
        activation=batch.activation if by_column else "", kept=keep is not None, by_column=by_column,
        places=batch.places, parts=parts, block_m=blocks.e, block_r=blocks.r, block_d=blocks.d,
        precision="ieee", upcast=INTERPRETED, num_warps=blocks.warps, num_stages=1,
    )  # fmt: skip
    if parts == 1:
        return strided[0], sums[0]
    return strided.sum(0).to(like.dtype), sums.sum(0).to(like.dtype)
