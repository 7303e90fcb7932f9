"""`batched_scale` in Triton: two kernels, no atomics, every sum in a fixed order.

    scale   y = x ⊙ l             also dX = dY ⊙ l
    reduce  dl_k = Σ dY ⊙ x       over the positions of k's rows

All positions of a row use the same adapter, so a program of `scale` belongs to one row and reads one vector. Products
are taken in fp32 and rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def scale(
    x: tl.tensor,
    vectors: tl.tensor,
    out: tl.tensor,
    index: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    x_token: tl.tensor,
    x_column: tl.tensor,
    v_adapter: tl.tensor,
    v_column: tl.tensor,
    block_t: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """out[n, t, d] = x[n, t, d] l_k[d] with k = index[n]; the bits of x where k is -1."""
    down = tl.cdiv(tokens, block_t)
    row = (tl.program_id(0) // down).to(tl.int64)
    adapter = tl.load(index + row)
    t = tl.program_id(0) % down * block_t + tl.arange(0, block_t)
    d = tl.program_id(1) * block_d + tl.arange(0, block_d)
    token = row * tokens + t
    values = tl.load(
        x + token[:, None] * x_token + d[None, :] * x_column,
        mask=(t < tokens)[:, None] & (d < width)[None, :],
        other=0.0,
    )
    if adapter >= 0:
        factor = tl.load(vectors + adapter * v_adapter + d * v_column, mask=(d < width), other=0.0)
        values = (values.to(tl.float32) * factor.to(tl.float32)[None, :]).to(values.dtype)
    tl.store(
        out + token[:, None] * width + d[None, :],
        values,
        mask=(t < tokens)[:, None] & (d < width)[None, :],
    )


@triton.jit  # type: ignore[untyped-decorator]
def reduce(
    grad: tl.tensor,
    x: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    g_token: tl.tensor,
    g_column: tl.tensor,
    x_token: tl.tensor,
    x_column: tl.tensor,
    out_part: tl.tensor,
    parts: tl.constexpr,
    block_t: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """out[part, k, d] = Σ dY[n, t, d] x[n, t, d] over this part's positions (n, t) of the rows n of adapter k."""
    adapter, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    start = tl.load(offsets + adapter).to(tl.int64) * tokens
    end = tl.load(offsets + adapter + 1).to(tl.int64) * tokens
    d = tl.program_id(1) * block_d + tl.arange(0, block_d)
    total = tl.zeros((block_t, block_d), dtype=tl.float32)
    for first in range(start + part * block_t, end, parts * block_t):
        position = first + tl.arange(0, block_t)
        inside = position < end
        row = tl.load(order + position // tokens, mask=inside, other=0)
        token = row.to(tl.int64) * tokens + position % tokens
        one = tl.load(
            grad + token[:, None] * g_token + d[None, :] * g_column,
            mask=inside[:, None] & (d < width)[None, :],
            other=0.0,
        )
        other = tl.load(
            x + token[:, None] * x_token + d[None, :] * x_column,
            mask=inside[:, None] & (d < width)[None, :],
            other=0.0,
        )
        total += one.to(tl.float32) * other.to(tl.float32)
    tl.store(out + part * out_part + adapter * width + d, tl.sum(total, 0), mask=(d < width))
