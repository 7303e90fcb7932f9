"""`batched_bottleneck` in Triton: four kernels over a flat list of tiles, no atomics, every sum in a fixed order.

    shrink  Z = x Dᵀ + c
    inner   dZ/f = keep ⊙ act'(Z) ⊙ dY U       also the part of the weights' gradient that each entry has
    expand  y = f (H Uᵀ + e)                   also dX = dZ D
    outer   dU = dYᵀ (f H) and de = Σ f dY     also dD = dZᵀ x and dc = Σ dZ

with H = keep ⊙ act(Z), which is never stored: who reads Z applies the activation. Matrices are read through strides,
and sizes are true: hidden units of an adapter beyond its own size are not read. With few tiles (decoding) the shrink
is split along D into parts that the expand adds up in their order; the first has the bias.

A tile holds entries of one adapter. An entry is a token and one of its M places; entry e belongs to token e // M.
`tl.dot` needs blocks of 16 or more. Where `upcast` is set, 16-bit numbers are widened as soon as they are read:
Triton's interpreter multiplies bfloat16 wrongly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graftory.kernels.batched_bottleneck.nonlinear import activated, derived


@triton.jit  # type: ignore[untyped-decorator]
def shrink(
    x: tl.tensor,
    matrix: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    tile_adapter: tl.tensor,
    tile_start: tl.tensor,
    tile_end: tl.tensor,
    sizes: tl.tensor,
    part_stride: tl.tensor,
    width: tl.tensor,
    size_stride: tl.tensor,
    x_token: tl.tensor,
    x_column: tl.tensor,
    m_adapter: tl.tensor,
    m_unit: tl.tensor,
    m_column: tl.tensor,
    places: tl.constexpr,
    parts: tl.constexpr,
    block_m: tl.constexpr,
    block_r: tl.constexpr,
    block_d: tl.constexpr,
    precision: tl.constexpr,
    upcast: tl.constexpr,
) -> None:
    """out[part, e, r] = c_k[r] in part 0 + Σ_d x[token(e), d] D_k[r, d] over this part's d; zeros behind the size."""
    tile, part = tl.program_id(0), tl.program_id(1)
    adapter = tl.load(tile_adapter + tile).to(tl.int64)
    start, end = tl.load(tile_start + tile), tl.load(tile_end + tile)
    if (adapter >= 0) & (start < end):
        size = tl.load(sizes + adapter)
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
            columns = tl.load(
                matrix + adapter * m_adapter + r[None, :] * m_unit + d[:, None] * m_column,
                mask=(r < size)[None, :] & (d < width)[:, None],
                other=0.0,
            )
            if upcast:
                rows, columns = rows.to(tl.float32), columns.to(tl.float32)
            total = tl.dot(rows, columns, total, input_precision=precision)
        shift = tl.load(bias + adapter * size_stride + r, mask=(r < size) & (part == 0), other=0.0)
        tl.store(
            out + part * part_stride + entry[:, None] * size_stride + r[None, :],
            total + shift.to(tl.float32)[None, :],
            mask=inside[:, None] & (r < size_stride)[None, :],
        )


@triton.jit  # type: ignore[untyped-decorator]
def inner(
    grad: tl.tensor,
    matrix: tl.tensor,
    bias: tl.tensor,
    before: tl.tensor,
    keep: tl.tensor,
    out: tl.tensor,
    products: tl.tensor,
    order: tl.tensor,
    tile_adapter: tl.tensor,
    tile_start: tl.tensor,
    tile_end: tl.tensor,
    sizes: tl.tensor,
    width: tl.tensor,
    size_stride: tl.tensor,
    grad_token: tl.tensor,
    grad_column: tl.tensor,
    m_adapter: tl.tensor,
    m_unit: tl.tensor,
    m_column: tl.tensor,
    activation: tl.constexpr,
    kept: tl.constexpr,
    weighted: tl.constexpr,
    places: tl.constexpr,
    block_m: tl.constexpr,
    block_r: tl.constexpr,
    block_d: tl.constexpr,
    precision: tl.constexpr,
    upcast: tl.constexpr,
) -> None:
    """out[e, r] = keep[e, r] act'(Z[e, r]) G[e, r] with G = dY U_k; zeros behind the size.

    If `weighted`, products[e] = Σ_r G[e, r] H[e, r] + Σ_d dY[token(e), d] e_k[d].
    """
    tile = tl.program_id(0)
    adapter = tl.load(tile_adapter + tile).to(tl.int64)
    start, end = tl.load(tile_start + tile), tl.load(tile_end + tile)
    if (adapter >= 0) & (start < end):
        size = tl.load(sizes + adapter)
        position = start + tl.arange(0, block_m)
        inside = position < end
        entry = tl.load(order + position, mask=inside, other=0).to(tl.int64)
        token = entry // places
        r = tl.arange(0, block_r)
        total = tl.zeros((block_m, block_r), dtype=tl.float32)
        product = tl.zeros((block_m,), dtype=tl.float32)
        for first in range(0, width, block_d):
            d = first + tl.arange(0, block_d)
            rows = tl.load(
                grad + token[:, None] * grad_token + d[None, :] * grad_column,
                mask=inside[:, None] & (d < width)[None, :],
                other=0.0,
            )
            columns = tl.load(
                matrix + adapter * m_adapter + r[None, :] * m_unit + d[:, None] * m_column,
                mask=(r < size)[None, :] & (d < width)[:, None],
                other=0.0,
            )
            if upcast:
                rows, columns = rows.to(tl.float32), columns.to(tl.float32)
            total = tl.dot(rows, columns, total, input_precision=precision)
            if weighted:
                constant = tl.load(bias + adapter * width + d, mask=(d < width), other=0.0).to(tl.float32)
                product += tl.sum(rows.to(tl.float32) * constant[None, :], 1)
        known = inside[:, None] & (r < size)[None, :]
        place = entry[:, None] * size_stride + r[None, :]
        z = tl.load(before + place, mask=known, other=0.0)
        if kept:
            total = total * tl.load(keep + place, mask=known, other=0.0).to(tl.float32)
        if weighted:
            product += tl.sum(total * activated(z, activation), 1)
            tl.store(products + entry, product, mask=inside)
        tl.store(
            out + place,
            total * derived(z, activation),
            mask=inside[:, None] & (r < size_stride)[None, :],
        )


@triton.jit  # type: ignore[untyped-decorator]
def expand(
    hidden: tl.tensor,
    matrix: tl.tensor,
    bias: tl.tensor,
    keep: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    tile_adapter: tl.tensor,
    tile_start: tl.tensor,
    tile_end: tl.tensor,
    sizes: tl.tensor,
    factor: tl.tensor,
    part_stride: tl.tensor,
    width: tl.tensor,
    size_stride: tl.tensor,
    m_adapter: tl.tensor,
    m_unit: tl.tensor,
    m_column: tl.tensor,
    activation: tl.constexpr,
    kept: tl.constexpr,
    biased: tl.constexpr,
    parts: tl.constexpr,
    block_m: tl.constexpr,
    block_k: tl.constexpr,
    block_d: tl.constexpr,
    precision: tl.constexpr,
    upcast: tl.constexpr,
) -> None:
    """out[e, d] = f[e] (Σ_r keep[e, r] act(hidden[e, r]) M_k[r, d] + bias_k[d]); exact zeros without an adapter.

    Without `activation`, `kept` or `biased` it is without these.
    """
    tile = tl.program_id(0)
    adapter = tl.load(tile_adapter + tile).to(tl.int64)
    start, end = tl.load(tile_start + tile), tl.load(tile_end + tile)
    if start < end:
        position = start + tl.arange(0, block_m)
        inside = position < end
        entry = tl.load(order + position, mask=inside, other=0).to(tl.int64)
        d = tl.program_id(1) * block_d + tl.arange(0, block_d)
        total = tl.zeros((block_m, block_d), dtype=tl.float32)
        if adapter >= 0:
            size = tl.load(sizes + adapter)
            scale = tl.load(factor + entry, mask=inside, other=0.0)[:, None]
            if biased:
                constant = tl.load(bias + adapter * width + d, mask=(d < width), other=0.0).to(tl.float32)
                total += scale * constant[None, :]
            # in steps, as a whole row of activations takes too many registers
            for first in range(0, size, block_k):
                r = first + tl.arange(0, block_k)
                known = inside[:, None] & (r < size)[None, :]
                place = entry[:, None] * size_stride + r[None, :]
                rows = tl.zeros((block_m, block_k), dtype=tl.float32)
                for part in range(parts):
                    rows += tl.load(hidden + part * part_stride + place, mask=known, other=0.0)
                rows = activated(rows, activation)
                if kept:
                    rows = rows * tl.load(keep + place, mask=known, other=0.0).to(tl.float32)
                columns = tl.load(
                    matrix + adapter * m_adapter + r[:, None] * m_unit + d[None, :] * m_column,
                    mask=(r < size)[:, None] & (d < width)[None, :],
                    other=0.0,
                )
                if upcast:
                    columns = columns.to(tl.float32)
                total = tl.dot((rows * scale).to(columns.dtype), columns, total, input_precision=precision)
        tl.store(
            out + entry[:, None] * width + d[None, :],
            total,
            mask=inside[:, None] & (d < width)[None, :],
        )


@triton.jit  # type: ignore[untyped-decorator]
def outer(
    hidden: tl.tensor,
    keep: tl.tensor,
    x: tl.tensor,
    out: tl.tensor,
    sums: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    sizes: tl.tensor,
    factor: tl.tensor,
    width: tl.tensor,
    size_stride: tl.tensor,
    x_token: tl.tensor,
    x_column: tl.tensor,
    out_part: tl.tensor,
    out_adapter: tl.tensor,
    out_unit: tl.tensor,
    out_column: tl.tensor,
    sums_part: tl.tensor,
    activation: tl.constexpr,
    kept: tl.constexpr,
    by_column: tl.constexpr,
    places: tl.constexpr,
    parts: tl.constexpr,
    block_m: tl.constexpr,
    block_r: tl.constexpr,
    block_d: tl.constexpr,
    precision: tl.constexpr,
    upcast: tl.constexpr,
) -> None:
    """out[part, k, r, d] = Σ_e f[e] keep[e, r] act(hidden[e, r]) x[token(e), d] over this part's entries, in order.

    And, if `by_column`, sums[part, k, d] = Σ_e f[e] x[token(e), d], else sums[part, k, r] = Σ_e f[e] hidden[e, r].
    """
    adapter, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    start, end = tl.load(offsets + adapter), tl.load(offsets + adapter + 1)
    size = tl.load(sizes + adapter)
    r = tl.arange(0, block_r)
    d = tl.program_id(1) * block_d + tl.arange(0, block_d)
    total = tl.zeros((block_r, block_d), dtype=tl.float32)
    aside = tl.zeros((block_d if by_column else block_r,), dtype=tl.float32)
    for first in range(start + part * block_m, end, parts * block_m):
        position = first + tl.arange(0, block_m)
        inside = position < end
        entry = tl.load(order + position, mask=inside, other=0).to(tl.int64)
        known = inside[None, :] & (r < size)[:, None]
        place = entry[None, :] * size_stride + r[:, None]
        scale = tl.load(factor + entry, mask=inside, other=0.0)
        rows = activated(tl.load(hidden + place, mask=known, other=0.0), activation) * scale[None, :]
        if kept:
            rows = rows * tl.load(keep + place, mask=known, other=0.0).to(tl.float32)
        columns = tl.load(
            x + (entry // places)[:, None] * x_token + d[None, :] * x_column,
            mask=inside[:, None] & (d < width)[None, :],
            other=0.0,
        )
        if upcast:
            columns = columns.to(tl.float32)
        if by_column:
            aside += tl.sum(columns.to(tl.float32) * scale[:, None], 0)
        else:
            aside += tl.sum(rows, 1)
        total = tl.dot(rows.to(columns.dtype), columns, total, input_precision=precision)
    tl.store(
        out + part * out_part + adapter * out_adapter + r[:, None] * out_unit + d[None, :] * out_column,
        total,
        mask=(r < size_stride)[:, None] & (d < width)[None, :],
    )
    if by_column:
        tl.store(sums + part * sums_part + adapter * width + d, aside, mask=(d < width))
    elif tl.program_id(1) == 0:
        tl.store(sums + part * sums_part + adapter * size_stride + r, aside, mask=(r < size_stride))
