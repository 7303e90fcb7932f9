"""`batched_lora` on a GPU: how the kernels are launched."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from graftory.kernels.batched_lora import kernel
from graftory.kernels.batched_lora.gathered import Gradients, factors, weight_gradient
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


def forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    index: Tensor,
    weight: Tensor | None,
    ranks: Tensor | None,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """As `gathered.forward`, with the true ranks [K]; S is [E, R] in fp32, and only made whole if it is to be kept."""
    tokens, entry_index, factor = _entries(x, index, scale, weight)
    adapters, rank = a.shape[:2]
    blocks = blocks_for(len(entry_index), adapters, rank, a.dtype)
    tiles = cut(entry_index, adapters, blocks.m)
    ranks = _true_ranks(ranks, a)
    hidden = _shrink(tokens, a, tiles, ranks, blocks, index.shape[1], split=not keep)
    out = _expand(hidden, b.transpose(1, 2), tiles, ranks, factor, blocks)
    update = _rows(out, x, index.shape[1])
    return update, hidden[0] if keep else hidden.new_empty(0)


def backward(
    grad: Tensor,
    hidden: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    index: Tensor,
    weight: Tensor | None,
    ranks: Tensor | None,
    needed: tuple[bool, bool, bool, bool],
) -> Gradients:
    """As `gathered.backward`."""
    tokens, entry_index, factor = _entries(x, index, scale, weight)
    adapters, rank = a.shape[:2]
    places = index.shape[1]
    blocks = blocks_for(len(entry_index), adapters, rank, a.dtype)
    tiles = cut(entry_index, adapters, blocks.m)
    ranks = _true_ranks(ranks, a)
    flat = grad.reshape(-1, grad.shape[-1])
    inner = _shrink(flat, b.transpose(1, 2), tiles, ranks, blocks, places, split=False)
    grad_x = grad_a = grad_b = grad_weight = None
    if needed[0]:
        grad_x = _rows(_expand(inner, a, tiles, ranks, factor, blocks), x, places)
    if needed[1]:
        grad_a = empty(tuple(a.shape), a.dtype, a.device)
        _outer(inner[0], tokens, grad_a, tiles, ranks, factor, blocks, places)
    if needed[2]:
        grad_b = empty(tuple(b.shape), b.dtype, b.device)
        _outer(hidden, flat, grad_b.transpose(1, 2), tiles, ranks, factor, blocks, places)
    if needed[3]:
        used = (entry_index >= 0)[:, None]
        rows = [each.masked_fill(~used, 0.0).view(*x.shape[:2], places * rank) for each in (inner[0], hidden)]
        grad_weight = weight_gradient(rows[0], rows[1], scale, index)
    return Gradients(grad_x, grad_a, grad_b, grad_weight)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a kernel to write, all of it."""
    return torch.empty(shape, dtype=dtype, device=device)


def _entries(x: Tensor, index: Tensor, scale: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [N T, D], and adapter and factor (fp32) of each entry, N T M of them."""
    length = x.shape[1]
    by_row = factors(scale, index, weight, torch.float32)
    adapter, factor = (values.repeat_interleave(length, 0).flatten() for values in (index, by_row))
    return x.reshape(-1, x.shape[-1]), adapter, factor


def _true_ranks(ranks: Tensor | None, a: Tensor) -> Tensor:
    if ranks is None:
        return torch.full((a.shape[0],), a.shape[1], dtype=torch.int32, device=a.device)
    return ranks.to(torch.int32)


def _rows(entries: Tensor, x: Tensor, places: int) -> Tensor:
    """[E, D] as [N, T, D], the places of a token added up in their order."""
    width = entries.shape[-1]
    total = entries if places == 1 else entries.view(len(entries) // places, places, width).sum(1)
    return total.view(*x.shape[:2], width)


def _shrink(
    x: Tensor, matrix: Tensor, tiles: Tiles, ranks: Tensor, blocks: Blocks, places: int, *, split: bool
) -> Tensor:
    """S in parts, [parts, E, R] in fp32, for matrices [K, R, D]."""
    entries, rank, width = len(tiles.order), matrix.shape[1], matrix.shape[2]
    parts = 1
    if split:
        parts = max(1, min(8, _PROGRAMS // max(1, len(tiles.adapter)), width // (2 * blocks.d)))
    out = empty((parts, entries, rank), torch.float32, x.device)
    if entries:
        kernel.shrink[(len(tiles.adapter), parts)](
            x, matrix, out, tiles.order, tiles.adapter, tiles.start, tiles.end, ranks,
            out.stride(0), width, rank, *x.stride(), *matrix.stride(),
            places=places, parts=parts, block_m=blocks.m, block_r=blocks.r, block_d=blocks.d,
            precision="ieee", upcast=INTERPRETED, num_warps=blocks.warps,
        )  # fmt: skip
    return out


def _expand(hidden: Tensor, matrix: Tensor, tiles: Tiles, ranks: Tensor, factor: Tensor, blocks: Blocks) -> Tensor:
    """[E, D] for parts of S and matrices [K, R, D]; every entry is written."""
    parts, entries, rank = hidden.shape
    width = matrix.shape[2]
    out = empty((entries, width), matrix.dtype, matrix.device)
    if entries:
        kernel.expand[(len(tiles.adapter), triton.cdiv(width, blocks.d))](
            hidden, matrix, out, tiles.order, tiles.adapter, tiles.start, tiles.end, ranks, factor,
            hidden.stride(0), width, rank, *matrix.stride(),
            parts=parts, block_m=blocks.m, block_r=blocks.r, block_d=blocks.d,
            precision="ieee", upcast=INTERPRETED, num_warps=blocks.warps, num_stages=1,
        )  # fmt: skip
    return out


def _outer(
    hidden: Tensor, x: Tensor, out: Tensor, tiles: Tiles, ranks: Tensor, factor: Tensor, blocks: Blocks, places: int
) -> None:
    """Fill `out` [K, R, D], in any layout: zeros for adapters without entries and behind a rank."""
    adapters, rank, width = out.shape
    columns = triton.cdiv(width, blocks.d)
    parts = max(1, min(8, _PROGRAMS // max(1, adapters * columns), len(tiles.order) // (adapters * 8 * blocks.m)))
    partial = out[None] if parts == 1 else empty((parts, *out.shape), torch.float32, out.device)
    kernel.outer[(adapters, columns, parts)](
        hidden, x, partial, tiles.order, tiles.offsets, ranks, factor,
        width, rank, *x.stride(), *partial.stride(),
        places=places, parts=parts, block_m=max(16, blocks.m), block_r=blocks.r, block_d=blocks.d,
        precision="ieee", upcast=INTERPRETED, num_warps=blocks.warps, num_stages=1,
    )  # fmt: skip
    if parts > 1:
        out.copy_(partial.sum(0))
