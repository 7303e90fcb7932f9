"""`batched_lora` in Triton where an adapter has about one entry: a program reads a matrix for one entry alone.

    shrink  S = x Aᵀ              also G = dY B
    expand  y = (f S) Bᵀ          also dX = (f G) A

The kernels of `kernel.py` take 16 entries at once, as `tl.dot` does, and of these most would be missing. Here nothing
is sorted and nothing padded: products are taken in fp32, element by element. Slices are as there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def shrink(
    x: tl.tensor,
    factor_matrix: tl.tensor,
    out: tl.tensor,
    adapter_of: tl.tensor,
    row_entries: tl.tensor,
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
    block_r: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """out[s, part, e, r] = Σ_d x[token(e), d] M_sk[r, d] over this part's d; zeros behind an adapter's rank.

    With `columns`, slice s takes its own columns of x and of M. Entries without an adapter are not written.
    """
    entry, part, slice_ = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = entry // row_entries * places + entry % places
    adapter = tl.load(adapter_of + place)
    factor_matrix += slice_ * m_slice
    if columns is not None:
        first_column = tl.load(columns + slice_) * unit
        width = tl.load(columns + slice_ + 1) * unit - first_column
        x += first_column * x_column
        factor_matrix += first_column * m_column
    if adapter >= 0:
        rank = tl.load(ranks + slice_ * adapters + adapter)
        r = tl.arange(0, block_r)
        total = tl.zeros((block_r, block_d), dtype=tl.float32)
        for first in range(part * block_d, width, parts * block_d):
            d = first + tl.arange(0, block_d)
            row = tl.load(x + (entry // places) * x_token + d * x_column, mask=(d < width), other=0.0)
            matrix = tl.load(
                factor_matrix + adapter * m_adapter + r[:, None] * m_rank + d[None, :] * m_column,
                mask=(r < rank)[:, None] & (d < width)[None, :],
                other=0.0,
            )
            total += row.to(matrix.dtype).to(tl.float32)[None, :] * matrix.to(tl.float32)
        tl.store(
            out + slice_ * out_slice + part * out_part + entry * rank_stride + r,
            tl.sum(total, 1),
            mask=(r < rank_stride),
        )


@triton.jit  # type: ignore[untyped-decorator]
def expand(
    hidden: tl.tensor,
    factor_matrix: tl.tensor,
    out: tl.tensor,
    adapter_of: tl.tensor,
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
    block_r: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """out[e, d] = s_k w[e] Σ_sr hidden[s, e, r] M_sk[r, d]; exact zeros for entries without an adapter.

    The sum is over `slices` of them, 1 with `columns`: then slice s makes its own columns of `out`, from those of M.
    With `adding` it is added to what is there, in fp32, and entries without an adapter are not touched.
    """
    entry, slice_ = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    place = entry // row_entries * places + entry % places
    adapter = tl.load(adapter_of + place)
    if columns is not None:
        first_column = tl.load(columns + slice_) * unit
        width = tl.load(columns + slice_ + 1) * unit - first_column
        factor_matrix += first_column * m_column
        out += first_column
    if (tl.program_id(1) * block_d < width) & ((adapter >= 0) | (not adding)):
        d = tl.program_id(1) * block_d + tl.arange(0, block_d)
        total = tl.zeros((block_d,), dtype=tl.float32)
        if adapter >= 0:
            r = tl.arange(0, block_r)
            factor = tl.load(scale + adapter).to(tl.float32)
            if weight is not None:
                factor *= tl.load(weight + place).to(tl.float32)
            for each in range(slices):
                rank = tl.load(ranks + (slice_ + each) * adapters + adapter)
                row = tl.zeros((block_r,), dtype=tl.float32)
                for part in tl.static_range(parts):  # all are read at once, not one after the other
                    row += tl.load(
                        hidden + (slice_ + each) * hidden_slice + part * hidden_part + entry * rank_stride + r,
                        mask=(r < rank),
                        other=0.0,
                    )
                matrix = tl.load(
                    factor_matrix
                    + (slice_ + each) * m_slice
                    + adapter * m_adapter
                    + r[:, None] * m_rank
                    + d[None, :] * m_column,
                    mask=(r < rank)[:, None] & (d < width)[None, :],
                    other=0.0,
                )
                total += tl.sum((row * factor)[:, None] * matrix.to(tl.float32), 0)
        where = out + entry * out_entry + d
        if adding:
            total += tl.load(where, mask=(d < width), other=0.0).to(tl.float32)
        tl.store(where, total, mask=(d < width))
