"""`batched_lora` in Triton: three kernels over a flat list of tiles, no atomics, every sum in a fixed order.

    shrink  S = x Aᵀ              also G = dY B
    expand  y = (f S) Bᵀ          also dX = (f G) A
    outer   dA = (f G)ᵀ x         also dB = dYᵀ (f S)

Each reads the factors through strides, so the same kernel serves both; ranks are true: columns of an adapter beyond its
own rank are not read. With few tiles (decoding) the shrink is split along D_in into parts that the expand adds up in
their order.

A tile holds entries of one adapter. An entry is a token and one of its M places; entry e belongs to token e // M.

Several slices (query, key and value; gate and up) are one launch: `ranks` is [S, K], and the last axis of the grid is
the slice. Where `columns` is given, slice s has the columns from `columns[s]` to `columns[s + 1]` of what is otherwise
shared, counted in units: that a width is a multiple of 16 then shows, and numbers are read several at once.

x, dY and dX may have another precision than the factors, in which products are taken: they are rounded, or widened, as
they are read, so that a 16-bit model with fp32 adapters makes no fp32 copy of its activations. `outer` is told which.

`tl.dot` needs blocks of 16 or more. Where `upcast` is set, 16-bit numbers are widened as soon as they are read:
Triton's interpreter multiplies bfloat16 wrongly.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def shrink(
    x: tl.tensor,
    factor_matrix: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    tile_adapter: tl.tensor,
    tile_start: tl.tensor,
    tile_end: tl.tensor,
    ranks: tl.tensor,
    columns: tl.tensor,
    adapters: tl.tensor,
    width: tl.tensor,
    rank_stride: tl.tensor,
    x_token: tl.tensor,
    x_column: tl.tensor,
    m_slice: tl.tensor,
    m_adapter: tl.tensor,
    m_rank: tl.tensor,
    m_column: tl.tensor,
    out_slice: tl.tensor,
    out_part: tl.tensor,
    places: tl.constexpr,
    parts: tl.constexpr,
    unit: tl.constexpr,
    block_m: tl.constexpr,
    block_r: tl.constexpr,
    block_d: tl.constexpr,
    precision: tl.constexpr,
    upcast: tl.constexpr,
) -> None:
    """out[s, part, e, r] = Σ_d x[token(e), d] M_sk[r, d] over this part's d; zeros behind an adapter's rank.

    With `columns`, slice s takes its own columns of x and of M.
    """
    tile, part, slice_ = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    factor_matrix += slice_ * m_slice
    out += slice_ * out_slice + part * out_part
    if columns is not None:
        first_column = tl.load(columns + slice_) * unit
        width = tl.load(columns + slice_ + 1) * unit - first_column
        x += first_column * x_column
        factor_matrix += first_column * m_column
    adapter = tl.load(tile_adapter + tile).to(tl.int64)
    start, end = tl.load(tile_start + tile), tl.load(tile_end + tile)
    if (adapter >= 0) & (start < end):
        rank = tl.load(ranks + slice_ * adapters + adapter)
        position = start + tl.arange(0, block_m)
        inside = position < end
        entry = tl.load(order + position, mask=inside, other=0).to(tl.int64)
        token = entry // places
        r = tl.arange(0, block_r)
        total = tl.zeros((block_m, block_r), dtype=tl.float32)
        for first in range(part * block_d, width, parts * block_d):
            d = first + tl.arange(0, block_d)
            rows = tl.load(
                x + token[:, None] * x_token + d[None, :] * x_column,
                mask=inside[:, None] & (d < width)[None, :],
                other=0.0,
            )
            matrix = tl.load(
                factor_matrix + adapter * m_adapter + r[None, :] * m_rank + d[:, None] * m_column,
                mask=(r < rank)[None, :] & (d < width)[:, None],
                other=0.0,
            )
            rows = rows.to(matrix.dtype)
            if upcast:
                rows, matrix = rows.to(tl.float32), matrix.to(tl.float32)
            total = tl.dot(rows, matrix, total, input_precision=precision)
        tl.store(
            out + entry[:, None] * rank_stride + r[None, :],
            total,
            mask=inside[:, None] & (r < rank_stride)[None, :],
        )


@triton.jit  # type: ignore[untyped-decorator]
def expand(
    hidden: tl.tensor,
    factor_matrix: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    tile_adapter: tl.tensor,
    tile_start: tl.tensor,
    tile_end: tl.tensor,
    ranks: tl.tensor,
    scale: tl.tensor,
    weight: tl.tensor,
    row_entries: tl.tensor,
    columns: tl.tensor,
    adapters: tl.tensor,
    width: tl.tensor,
    rank_stride: tl.tensor,
    hidden_slice: tl.tensor,
    hidden_part: tl.tensor,
    m_slice: tl.tensor,
    m_adapter: tl.tensor,
    m_rank: tl.tensor,
    m_column: tl.tensor,
    out_entry: tl.tensor,
    places: tl.constexpr,
    slices: tl.constexpr,
    parts: tl.constexpr,
    unit: tl.constexpr,
    adding: tl.constexpr,
    block_m: tl.constexpr,
    block_r: tl.constexpr,
    block_d: tl.constexpr,
    precision: tl.constexpr,
    upcast: tl.constexpr,
) -> None:
    """out[e, d] = s_k w[e] Σ_sr hidden[s, e, r] M_sk[r, d]; exact zeros for entries without an adapter.

    The sum is over `slices` of them, 1 with `columns`: then slice s makes its own columns of `out`, from those of M.
    With `adding` it is added to what is there, in fp32, and entries without an adapter are not touched.
    """
    tile, slice_ = tl.program_id(0), tl.program_id(2).to(tl.int64)
    adapter = tl.load(tile_adapter + tile).to(tl.int64)
    start, end = tl.load(tile_start + tile), tl.load(tile_end + tile)
    if columns is not None:
        first_column = tl.load(columns + slice_) * unit
        width = tl.load(columns + slice_ + 1) * unit - first_column
        factor_matrix += first_column * m_column
        out += first_column
    if (start < end) & (tl.program_id(1) * block_d < width) & ((adapter >= 0) | (not adding)):
        position = start + tl.arange(0, block_m)
        inside = position < end
        entry = tl.load(order + position, mask=inside, other=0).to(tl.int64)
        d = tl.program_id(1) * block_d + tl.arange(0, block_d)
        total = tl.zeros((block_m, block_d), dtype=tl.float32)
        if adapter >= 0:
            r = tl.arange(0, block_r)
            factor = tl.load(scale + adapter).to(tl.float32)
            if weight is not None:
                place = entry // row_entries * places + entry % places
                factor *= tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)[:, None]
            for each in range(slices):
                rank = tl.load(ranks + (slice_ + each) * adapters + adapter)
                known = inside[:, None] & (r < rank)[None, :]
                rows = tl.zeros((block_m, block_r), dtype=tl.float32)
                for part in tl.static_range(parts):  # all are read at once, not one after the other
                    rows += tl.load(
                        hidden
                        + (slice_ + each) * hidden_slice
                        + part * hidden_part
                        + entry[:, None] * rank_stride
                        + r[None, :],
                        mask=known,
                        other=0.0,
                    )
                rows = rows * factor
                matrix = tl.load(
                    factor_matrix
                    + (slice_ + each) * m_slice
                    + adapter * m_adapter
                    + r[:, None] * m_rank
                    + d[None, :] * m_column,
                    mask=(r < rank)[:, None] & (d < width)[None, :],
                    other=0.0,
                )
                if upcast:
                    matrix = matrix.to(tl.float32)
                total = tl.dot(rows.to(matrix.dtype), matrix, total, input_precision=precision)
        where = out + entry[:, None] * out_entry + d[None, :]
        if adding:
            total += tl.load(where, mask=inside[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
        tl.store(where, total, mask=inside[:, None] & (d < width)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def outer(
    hidden: tl.tensor,
    x: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    ranks: tl.tensor,
    scale: tl.tensor,
    weight: tl.tensor,
    row_entries: tl.tensor,
    columns: tl.tensor,
    adapters: tl.tensor,
    width: tl.tensor,
    rank_stride: tl.tensor,
    hidden_slice: tl.tensor,
    x_token: tl.tensor,
    x_column: tl.tensor,
    out_part: tl.tensor,
    out_slice: tl.tensor,
    out_adapter: tl.tensor,
    out_rank: tl.tensor,
    out_column: tl.tensor,
    places: tl.constexpr,
    parts: tl.constexpr,
    unit: tl.constexpr,
    block_m: tl.constexpr,
    block_r: tl.constexpr,
    block_d: tl.constexpr,
    product: tl.constexpr,
    precision: tl.constexpr,
    upcast: tl.constexpr,
) -> None:
    """out[part, s, k, r, d] = s_k Σ_e w[e] hidden[s, e, r] x[token(e), d] over this part's entries e of adapter k.

    They are added in their order. With `columns`, slice s takes its own columns of x, and makes those of `out`.
    """
    adapter, part, slice_ = tl.program_id(0).to(tl.int64), tl.program_id(2) % parts, tl.program_id(2) // parts
    start, end = tl.load(offsets + adapter), tl.load(offsets + adapter + 1)
    rank = tl.load(ranks + slice_ * adapters + adapter)
    factor = tl.load(scale + adapter).to(tl.float32)
    hidden += slice_.to(tl.int64) * hidden_slice
    out += slice_.to(tl.int64) * out_slice
    if columns is not None:
        first_column = tl.load(columns + slice_) * unit
        width = tl.load(columns + slice_ + 1) * unit - first_column
        x += first_column * x_column
        out += first_column * out_column
        # a program behind a narrower slice has nothing to add up
        end = tl.where(tl.program_id(1) * block_d < width, end, start)
    r = tl.arange(0, block_r)
    d = tl.program_id(1) * block_d + tl.arange(0, block_d)
    total = tl.zeros((block_r, block_d), dtype=tl.float32)
    for first in range(start + part * block_m, end, parts * block_m):
        position = first + tl.arange(0, block_m)
        inside = position < end
        entry = tl.load(order + position, mask=inside, other=0).to(tl.int64)
        rows = tl.load(
            hidden + entry[None, :] * rank_stride + r[:, None],
            mask=inside[None, :] & (r < rank)[:, None],
            other=0.0,
        )
        rows *= factor
        if weight is not None:
            place = entry // row_entries * places + entry % places
            rows *= tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)[None, :]
        numbers = tl.load(
            x + (entry // places)[:, None] * x_token + d[None, :] * x_column,
            mask=inside[:, None] & (d < width)[None, :],
            other=0.0,
        )
        numbers = numbers.to(product)
        if upcast:
            numbers = numbers.to(tl.float32)
        total = tl.dot(rows.to(numbers.dtype), numbers, total, input_precision=precision)
    tl.store(
        out + part * out_part + adapter * out_adapter + r[:, None] * out_rank + d[None, :] * out_column,
        total,
        mask=(r < rank_stride)[:, None] & (d < width)[None, :],
    )
