"""`batched_head` as its formula reads, row by row: what every other path is held against. Slow."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, sizes: Tensor, fill: float = float("-inf")
) -> Tensor:
    """See `batched_head`; here x is [N, T, D]."""
    rows = []
    for row, k in enumerate(index.tolist()):
        size = int(sizes[k]) if k >= 0 else 0
        logits = x[row] @ weight[k, :size].T
        logits = logits if bias is None else logits + bias[k, :size]
        rows.append(torch.cat([logits, logits.new_full((x.shape[1], weight.shape[1] - size), fill)], 1))
    return torch.stack(rows) if rows else x.new_zeros(*x.shape[:2], weight.shape[1])
