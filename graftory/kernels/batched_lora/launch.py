"""`batched_lora` on a GPU: how the kernels are launched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from graftory.kernels.batched_lora import decode, kernel
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


def single_blocks_for(rank: int) -> Blocks:
    """Of the kernels that take one entry at a time: 4096 numbers of a matrix, or 32 columns."""
    r = triton.next_power_of_2(rank)
    return Blocks(m=1, r=r, d=max(32, min(512, 4096 // r)), warps=8 if r > 128 else 4)


class Columns(NamedTuple):
    """Where the columns of each slice are in what slices share.

    Attributes:
        starts: [S + 1], int32: where each begins, and where the last ends, in units.
        unit: 16 if all widths are multiples of it, else 1.
        widest: Columns of the widest slice.
    """

    starts: Tensor
    unit: int
    widest: int


@lru_cache(maxsize=256)
def columns_of(widths: tuple[int, ...], device: torch.device) -> Columns:
    """Slices of these widths side by side. Kept, as to bring numbers to a device is to wait for it."""
    unit = 16 if all(width % 16 == 0 for width in widths) else 1
    starts = [sum(widths[:number]) // unit for number in range(len(widths) + 1)]
    return Columns(torch.tensor(starts, dtype=torch.int32, device=device), unit, max(widths))


@dataclass(frozen=True)
class Batch:
    """A batch as kernels see it.

    Attributes:
        tokens: x, [N T, D].
        adapter: Of each entry, [E] with E = N T M.
        factor: f of each entry, [E], fp32.
        ranks: [S, K], int32; S = 1 where there are no slices.
        places: M.
        blocks: Sizes.
    """

    tokens: Tensor
    adapter: Tensor
    factor: Tensor
    ranks: Tensor
    places: int
    blocks: Blocks

    @cached_property
    def tiles(self) -> Tiles:
        """The entries, cut; not made where every entry is taken alone."""
        return cut(self.adapter, self.ranks.shape[1], self.blocks.m)

    @property
    def single(self) -> bool:
        """Whether every entry is taken alone: there are no more of them than adapters. The index is not asked."""
        return len(self.adapter) <= self.ranks.shape[1]


def batch_of(inputs: Inputs) -> Batch:
    """How a batch is run; a is [K, R, D_in] or [S, K, R, D_in], and ranks of its first dimensions or [K]."""
    x, a, _, scale, index, weight, ranks = inputs
    by_row = factors(scale, index, weight, torch.float32)
    adapter, factor = (values.repeat_interleave(x.shape[1], 0).flatten() for values in (index, by_row))
    adapters, rank = a.shape[-3:-1]
    slices = a.shape[0] if a.dim() == 4 else 1
    true = torch.full((slices, adapters), rank, device=a.device) if ranks is None else ranks
    return Batch(
        tokens=x.reshape(-1, x.shape[-1]),
        adapter=adapter,
        factor=factor,
        ranks=true.to(torch.int32).expand(slices, adapters).contiguous(),
        places=index.shape[1],
        blocks=blocks_for(len(adapter), adapters, rank, a.dtype),
    )


def forward(inputs: Inputs, *, keep: bool) -> tuple[Tensor, Tensor]:
    """As `gathered.forward`; S is [E, R] in fp32, and only made whole if it is to be kept."""
    batch = batch_of(inputs)
    hidden = shrink(batch.tokens, inputs.a[None], batch, split=not keep)
    update = rows_of(expand(hidden, inputs.b.transpose(1, 2)[None], batch), inputs.x)
    return update, hidden[0, 0] if keep else hidden.new_empty(0)


def backward(grad: Tensor, hidden: Tensor, inputs: Inputs, needed: Needed) -> Gradients:
    """As `gathered.backward`."""
    x, a, b = inputs[:3]
    batch, flat = batch_of(inputs), grad.reshape(-1, grad.shape[-1])
    inner = shrink(flat, b.transpose(1, 2)[None], batch, split=False)
    grad_x = grad_a = grad_b = None
    if needed.x:
        grad_x = rows_of(expand(inner, a[None], batch), x)
    if needed.a:
        grad_a = empty(tuple(a.shape), a.dtype, a.device)
        outer(inner[:, 0], batch.tokens, grad_a[None], batch)
    if needed.b:
        grad_b = empty(tuple(b.shape), b.dtype, b.device)
        outer(hidden[None], flat, grad_b.transpose(1, 2)[None], batch)
    grad_weight = weight_gradient_of(inner[:, 0], hidden[None], inputs, batch) if needed.weight else None
    return Gradients(grad_x, grad_a, grad_b, grad_weight)


def weight_gradient_of(inner: Tensor, hidden: Tensor, inputs: Inputs, batch: Batch) -> Tensor:
    """`weight_gradient` of G and S [S, E, R], of which rows without an adapter were not written."""
    unused = (batch.adapter < 0)[:, None]
    shape = (*inputs.x.shape[:2], -1)
    inner, hidden = (each.masked_fill(unused, 0.0) for each in (inner, hidden))
    found = [
        weight_gradient(one.view(shape), other.view(shape), inputs.scale, inputs.adapter)
        for one, other in zip(inner, hidden, strict=True)
    ]
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a kernel to write, all of it."""
    return torch.empty(shape, dtype=dtype, device=device)


def rows_of(entries: Tensor, x: Tensor) -> Tensor:
    """[E, D] as [N, T, D], the places of a token added up in their order."""
    rows, tokens, _ = x.shape
    width, places = entries.shape[-1], len(entries) // max(1, rows * tokens)
    total = entries if places <= 1 else entries.view(rows * tokens, places, width).sum(1)
    return total.view(rows, tokens, width)


def shrink(x: Tensor, matrix: Tensor, batch: Batch, *, split: bool, columns: Columns | None = None) -> Tensor:
    """S in parts, [S, parts, E, R] in fp32, for matrices [S, K, R, D]; with `columns`, D holds slices, as x does."""
    entries, slices = len(batch.adapter), len(batch.ranks)
    rank, width = matrix.shape[2], columns.widest if columns else matrix.shape[3]
    blocks = single_blocks_for(rank) if batch.single else batch.blocks
    programs = slices * (entries if batch.single else len(batch.tiles.adapter))
    parts = max(1, min(8, _PROGRAMS // max(1, programs), width // (2 * blocks.d))) if split else 1
    out = empty((slices, parts, entries, rank), torch.float32, x.device)
    if not entries:
        return out
    starts, unit = (columns.starts, columns.unit) if columns else (None, 1)
    m_slice = 0 if columns else matrix.stride(0)
    sizes = (
        batch.ranks, starts, batch.ranks.shape[1], width, rank, *x.stride(), m_slice, *matrix.stride()[1:],
        *out.stride()[:2],
    )  # fmt: skip
    if batch.single:
        decode.shrink[(entries, parts, slices)](
            x, matrix, out, batch.adapter, *sizes,
            places=batch.places, parts=parts, unit=unit, block_r=blocks.r, block_d=blocks.d, num_warps=blocks.warps,
        )  # fmt: skip
        return out
    tiles = batch.tiles
    kernel.shrink[(len(tiles.adapter), parts, slices)](
        x, matrix, out, tiles.order, tiles.adapter, tiles.start, tiles.end, *sizes,
        places=batch.places, parts=parts, unit=unit, block_m=blocks.m, block_r=blocks.r, block_d=blocks.d,
        precision="ieee", upcast=INTERPRETED, num_warps=blocks.warps,
    )  # fmt: skip
    return out


def expand(
    hidden: Tensor, matrix: Tensor, batch: Batch, *, columns: Columns | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """[E, D] for S in parts and matrices [S, K, R, D], summed over slices; every entry is written.

    With `columns` the matrices are [1, K, R, D], and slices are side by side in D, as in what is given back.
    """
    slices, parts, entries, rank = hidden.shape
    width = matrix.shape[3]
    blocks = single_blocks_for(rank) if batch.single else batch.blocks
    out = empty((entries, width), dtype or matrix.dtype, matrix.device)
    if not entries:
        return out
    starts, unit = (columns.starts, columns.unit) if columns else (None, 1)
    summed, apart = (1, slices) if columns else (slices, 1)
    sizes = (
        batch.ranks, batch.factor, starts, batch.ranks.shape[1], width, rank, *hidden.stride()[:2],
        0 if columns else matrix.stride(0), *matrix.stride()[1:], width,
    )  # fmt: skip
    across = triton.cdiv(columns.widest if columns else width, blocks.d)
    if batch.single:
        decode.expand[(entries, across, apart)](
            hidden, matrix, out, batch.adapter, *sizes,
            slices=summed, parts=parts, unit=unit, block_r=blocks.r, block_d=blocks.d, num_warps=blocks.warps,
        )  # fmt: skip
        return out
    tiles = batch.tiles
    kernel.expand[(len(tiles.adapter), across, apart)](
        hidden, matrix, out, tiles.order, tiles.adapter, tiles.start, tiles.end, *sizes,
        slices=summed, parts=parts, unit=unit, block_m=blocks.m, block_r=blocks.r, block_d=blocks.d,
        precision="ieee", upcast=INTERPRETED, num_warps=blocks.warps, num_stages=1,
    )  # fmt: skip
    return out


def outer(hidden: Tensor, x: Tensor, out: Tensor, batch: Batch, *, columns: Columns | None = None) -> None:
    """Fill `out` [S, K, R, D], in any layout: zeros for adapters without entries and behind a rank.

    Here `hidden` is [S, E, R]. With `columns`, x [., D] and `out` [1, K, R, D] hold the slices side by side.
    """
    tiles, blocks, slices = batch.tiles, batch.blocks, len(hidden)
    _, adapters, rank, width = out.shape
    across = triton.cdiv(columns.widest if columns else width, blocks.d)
    programs = max(1, slices * adapters * across)
    parts = max(1, min(8, _PROGRAMS // programs, len(tiles.order) // (adapters * 8 * blocks.m)))
    partial = out[None] if parts == 1 else empty((parts, *out.shape), torch.float32, out.device)
    starts, unit = (columns.starts, columns.unit) if columns else (None, 1)
    out_part, out_slice, *out_strides = partial.stride()
    kernel.outer[(adapters, across, parts * slices)](
        hidden, x, partial, tiles.order, tiles.offsets, batch.ranks, batch.factor, starts,
        adapters, width, rank, hidden.stride(0), *x.stride(), out_part, 0 if columns else out_slice, *out_strides,
        places=batch.places, parts=parts, unit=unit, block_m=blocks.m, block_r=blocks.r, block_d=blocks.d,
        precision="ieee", upcast=INTERPRETED, num_warps=blocks.warps, num_stages=1,
    )  # fmt: skip
    if parts > 1:
        out.copy_(partial.sum(0))
