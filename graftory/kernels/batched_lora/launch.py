"""`batched_lora` on a GPU: how the kernels are launched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from graftory.kernels.batched_lora import decode, kernel
from graftory.kernels.batched_lora.gathered import weight_gradient
from graftory.kernels.batched_lora.inputs import Gradients, Inputs, Needed
from graftory.kernels.routing import Routing
from graftory.kernels.tiles import Tiles

INTERPRETED = type(kernel.shrink).__name__ == "InterpretedFunction"
"""Whether `TRITON_INTERPRET` was set when the kernels were made: then they run on the CPU, slowly."""
PRODUCT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""In what a product is taken, by the dtype of the factors."""
MAX_PARTS = 32
"""Of a sum: a program of `expand` reads them all."""
OUTER_PROGRAMS = 512
"""That keep a GPU busy with `outer`; with fewer, its sums over entries are split."""


class Block(NamedTuple):
    """Sizes of a kernel's block: entries, columns; and its warps."""

    m: int
    d: int
    warps: int


class Blocks(NamedTuple):
    """Hidden units, all of an adapter; the blocks of each kernel; and how many programs keep a GPU busy.

    With fewer of them the sum of `shrink` is split; `shrink` and `expand` have entries alike, as they have tiles alike.
    """

    r: int
    shrink: Block
    expand: Block
    outer: Block
    programs: int


@lru_cache(maxsize=1024)
def blocks_for(entries: int, adapters: int, rank: int, dtype: torch.dtype) -> Blocks:
    """As they were fastest on an H100, as far as registers last: `tests/test_kernels_compile.py` looks for spills.

    Few entries, or few an adapter (decoding), are taken 16 at a time, more of them 32 or 64 at a time.
    """
    r = max(16, triton.next_power_of_2(rank))
    full = dtype == torch.float32
    if r > 128 or (r == 128 and full):
        warps = 8
        return Blocks(r, Block(16, 32, warps), Block(16, 32, warps), Block(16, 32, warps), 64)
    each = entries // max(1, min(adapters, entries))
    m = next((size for size in (64, 32) if entries >= 32 * size and each >= size), 16)
    d, warps = (64 if full else 128), (8 if m * r >= 64 * 64 else 4)
    return Blocks(
        r=r,
        shrink=Block(m, d, warps),
        expand=Block(m, (64 if full else 128) if r < 128 else 256, 4 if r <= 32 else 8),
        outer=Block(16 if m == 16 else 64, 128 if r <= 32 else 64, 8 if r == 128 and m > 16 else 4),
        programs=64 if r == 128 else 128,
    )


def expand_block(blocks: Blocks, slices: int) -> Block:
    """That of `expand`; where it sums over slices and adapters are large, a narrower one, for its registers."""
    block = blocks.expand
    return block if slices == 1 or blocks.r < 128 else block._replace(d=min(block.d, 64))


@lru_cache(maxsize=256)
def single_blocks_for(rank: int) -> Blocks:
    """Of the kernels that take one entry at a time; there is no `outer` of them."""
    r = triton.next_power_of_2(rank)
    shrink = Block(1, 256 if r <= 32 else 128 if r <= 128 else 64, 8 if r > 128 else 4)
    expand = Block(1, 256 if r <= 32 else 64, 8 if r > 128 else 4)
    return Blocks(r, shrink, expand, expand, 256)


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
        routing: Which adapters each row uses, at M places.
        each: T.
        scale: [K].
        weight: [N, M] in one piece, or None.
        ranks: [S, K]; S = 1 where there are no slices.
        blocks: Sizes.
    """

    tokens: Tensor
    routing: Routing
    each: int
    scale: Tensor
    weight: Tensor | None
    ranks: Tensor
    blocks: Blocks

    @cached_property
    def tiles(self) -> Tiles:
        """The entries, cut; not made where every entry is taken alone."""
        return self.routing.tiles(self.each, self.ranks.shape[1], self.blocks.shrink.m)

    @property
    def places(self) -> int:
        """M."""
        return self.routing.places.shape[1]

    @property
    def row_entries(self) -> int:
        """T M."""
        return self.each * self.places

    @property
    def entries(self) -> int:
        """E = N T M."""
        return self.routing.places.shape[0] * self.row_entries

    @property
    def adapter(self) -> Tensor:
        """Of each entry, [E]."""
        return self.routing.entries(self.each)

    @property
    def single(self) -> bool:
        """Whether every entry is taken alone: there are no more of them than adapters. The index is not asked."""
        return self.entries <= self.ranks.shape[1]


def batch_of(inputs: Inputs, routing: Routing) -> Batch:
    """How a batch is run; a is [K, R, D_in] or [S, K, R, D_in], and ranks of its first dimensions or [K]."""
    x, a, _, scale, _, weight, ranks = inputs
    adapters, rank = a.shape[-3:-1]
    slices = a.shape[0] if a.dim() == 4 else 1
    if ranks is None:
        true = whole_rank(slices, adapters, rank, a.device)
    else:
        true = ranks.expand(slices, adapters).contiguous()
    return Batch(
        tokens=x.reshape(-1, x.shape[-1]),
        routing=routing,
        each=x.shape[1],
        scale=scale.contiguous(),
        weight=None if weight is None else weight.contiguous(),
        ranks=true,
        blocks=blocks_for(routing.places.numel() * x.shape[1], adapters, rank, a.dtype),
    )


@lru_cache(maxsize=256)
def whole_rank(slices: int, adapters: int, rank: int, device: torch.device) -> Tensor:
    """[S, K]: every adapter's rank is all there is room for. Kept, as columns are."""
    return torch.full((slices, adapters), rank, dtype=torch.int32, device=device)


def forward(inputs: Inputs, routing: Routing, *, keep: bool, onto: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `gathered.forward`; S is [E, R] in fp32, and only made whole if it is to be kept."""
    batch = batch_of(inputs, routing)
    hidden = shrink(batch.tokens, inputs.a[None], batch, split=not keep)
    kept, b = hidden[0, 0] if keep else hidden, inputs.b.transpose(1, 2)[None]
    if onto is not None and batch.places == 1 and onto.is_contiguous():
        expand(hidden, b, batch, onto=onto.view(-1, onto.shape[-1]))
        return onto, kept
    update = rows_of(expand(hidden, b, batch), inputs.x)
    return update if onto is None else onto.add_(update), kept


def backward(grad: Tensor, hidden: Tensor, inputs: Inputs, routing: Routing, needed: Needed) -> Gradients:
    """As `gathered.backward`."""
    x, a, b = inputs[:3]
    batch, flat = batch_of(inputs, routing), grad.reshape(-1, grad.shape[-1])
    inner = shrink(flat, b.transpose(1, 2)[None], batch, split=False)
    grad_x = grad_a = grad_b = None
    if needed.x:
        # places are added up before they are rounded to x's precision
        dtype = x.dtype if batch.places == 1 else a.dtype
        grad_x = rows_of(expand(inner, a[None], batch, dtype=dtype), x).to(x.dtype)
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


def ceil_div(count: int, size: int) -> int:
    """How many blocks of a size hold them."""
    return -(-count // size)


def parts_for(tiles: int, blocks: Blocks, width: int) -> int:
    """In how many parts the sum of `shrink` is taken, a power of two: few programs leave a GPU idle."""
    parts = max(1, min(MAX_PARTS, blocks.programs // max(1, tiles), width // blocks.shrink.d))
    return 1 << (parts.bit_length() - 1)


def shrink(x: Tensor, matrix: Tensor, batch: Batch, *, split: bool, columns: Columns | None = None) -> Tensor:
    """S, [S, parts, E, R] in fp32, for matrices [S, K, R, D]; with `columns`, D holds slices, as x does.

    With `split` it is left in parts, as `expand` takes it; else there is one.
    """
    entries, slices = batch.entries, batch.ranks.shape[0]
    rank, width = matrix.shape[2], columns.widest if columns else matrix.shape[3]
    blocks = single_blocks_for(rank) if batch.single else batch.blocks
    block = blocks.shrink
    parts = parts_for(slices * ceil_div(entries, block.m), blocks, width)
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
            x, matrix, out, batch.routing.places, batch.row_entries, *sizes,
            places=batch.places, parts=parts, unit=unit, block_r=blocks.r, block_d=block.d, num_warps=block.warps,
        )  # fmt: skip
        return out if split or parts == 1 else out.sum(1, keepdim=True)
    tiles = batch.tiles
    kernel.shrink[(tiles.adapter.shape[0], parts, slices)](
        x, matrix, out, tiles.order, tiles.adapter, tiles.start, tiles.end, *sizes,
        places=batch.places, parts=parts, unit=unit, block_m=block.m, block_r=blocks.r, block_d=block.d,
        precision="ieee", upcast=INTERPRETED, num_warps=block.warps,
    )  # fmt: skip
    return out if split or parts == 1 else out.sum(1, keepdim=True)


def expand(
    hidden: Tensor,
    matrix: Tensor,
    batch: Batch,
    *,
    columns: Columns | None = None,
    dtype: torch.dtype | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """[E, D] for S in parts and matrices [S, K, R, D], summed over slices; every entry is written.

    Or added to `onto`, [E, D] in one piece, where entries without an adapter keep their bits.

    With `columns` the matrices are [1, K, R, D], and slices are side by side in D, as in what is given back.
    """
    slices, parts, entries, rank = hidden.shape
    width = matrix.shape[3]
    blocks = single_blocks_for(rank) if batch.single else batch.blocks
    out = empty((entries, width), dtype or matrix.dtype, matrix.device) if onto is None else onto
    if not entries:
        return out
    starts, unit = (columns.starts, columns.unit) if columns else (None, 1)
    summed, apart = (1, slices) if columns else (slices, 1)
    sizes = (
        batch.ranks, batch.scale, batch.weight, batch.row_entries, starts, batch.ranks.shape[1], width, rank,
        *hidden.stride()[:2],
        0 if columns else matrix.stride(0), *matrix.stride()[1:], width,
    )  # fmt: skip
    block = expand_block(blocks, summed)
    across = ceil_div(columns.widest if columns else width, block.d)
    if batch.single:
        decode.expand[(entries, across, apart)](
            hidden, matrix, out, batch.routing.places, *sizes,
            places=batch.places, slices=summed, parts=parts, unit=unit, adding=onto is not None,
            block_r=blocks.r, block_d=block.d, num_warps=block.warps,
        )  # fmt: skip
        return out
    tiles = batch.tiles
    kernel.expand[(tiles.adapter.shape[0], across, apart)](
        hidden, matrix, out, tiles.order, tiles.adapter, tiles.start, tiles.end, *sizes,
        places=batch.places, slices=summed, parts=parts, unit=unit, adding=onto is not None,
        block_m=block.m, block_r=blocks.r, block_d=block.d,
        precision="ieee", upcast=INTERPRETED, num_warps=block.warps, num_stages=1,
    )  # fmt: skip
    return out


def outer(hidden: Tensor, x: Tensor, out: Tensor, batch: Batch, *, columns: Columns | None = None) -> None:
    """Fill `out` [S, K, R, D], in any layout: zeros for adapters without entries and behind a rank.

    Here `hidden` is [S, E, R], and `out` of the factors' dtype. With `columns`, x [., D] and `out` [1, K, R, D] hold
    the slices side by side.
    """
    tiles, block, slices = batch.tiles, batch.blocks.outer, hidden.shape[0]
    _, adapters, rank, width = out.shape
    across = ceil_div(columns.widest if columns else width, block.d)
    programs = max(1, slices * adapters * across)
    parts = max(1, min(8, OUTER_PROGRAMS // programs, tiles.order.shape[0] // (adapters * 8 * block.m)))
    partial = out[None] if parts == 1 else empty((parts, *out.shape), torch.float32, out.device)
    starts, unit = (columns.starts, columns.unit) if columns else (None, 1)
    out_part, out_slice, *out_strides = partial.stride()
    kernel.outer[(adapters, across, parts * slices)](
        hidden, x, partial, tiles.order, tiles.offsets, batch.ranks, batch.scale, batch.weight,
        batch.row_entries, starts, adapters, width, rank, hidden.stride(0), *x.stride(),
        out_part, 0 if columns else out_slice, *out_strides,
        places=batch.places, parts=parts, unit=unit, block_m=block.m, block_r=batch.blocks.r, block_d=block.d,
        product=PRODUCT[out.dtype], precision="ieee", upcast=INTERPRETED, num_warps=block.warps, num_stages=1,
    )  # fmt: skip
    if parts > 1:
        out.copy_(partial.sum(0))
