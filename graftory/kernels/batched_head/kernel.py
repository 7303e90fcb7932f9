"""`batched_head` in Triton: what its own kernel does to the products that `batched_lora`'s make.

    shrink  S = x Wᵀ, in parts; as the rank of an adapter there, so the size of a head here
    finish  logits = Σ S + b, and the fill behind a head's size
    expand  dX = G W
    outer   dW = Gᵀ x, db = Gᵀ 1

The sizes are looked at where something is read, so neither weights nor gradients behind them are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def finish(
    hidden: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    head_of: tl.tensor,
    sizes: tl.tensor,
    fill: tl.tensor,
    entries: tl.tensor,
    width: tl.tensor,
    hidden_part: tl.tensor,
    b_head: tl.tensor,
    b_output: tl.tensor,
    out_entry: tl.tensor,
    parts: tl.constexpr,
    block_m: tl.constexpr,
    block_r: tl.constexpr,
) -> None:
    """out[e, o] = Σ_part hidden[part, e, o] + b_k[o], or `fill` where o is not below the size of k; no b is 0."""
    entry = tl.program_id(0).to(tl.int64) * block_m + tl.arange(0, block_m)
    inside = entry < entries
    head = tl.load(head_of + entry, mask=inside, other=-1)
    size = tl.load(sizes + head, mask=(head >= 0), other=0)
    o = tl.arange(0, block_r)
    known = o[None, :] < size[:, None]
    total = tl.zeros((block_m, block_r), dtype=tl.float32)
    for part in range(parts):
        total += tl.load(hidden + part * hidden_part + entry[:, None] * width + o[None, :], mask=known, other=0.0)
    if bias is not None:
        own = tl.load(bias + head[:, None] * b_head + o[None, :] * b_output, mask=known, other=0.0)
        total += own.to(tl.float32)
    tl.store(
        out + entry[:, None] * out_entry + o[None, :],
        tl.where(known, total, fill),
        mask=inside[:, None] & (o < width)[None, :],
    )
