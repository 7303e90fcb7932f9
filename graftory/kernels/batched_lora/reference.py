"""`batched_lora` as its formula reads, row by row: what every other path is held against. Slow."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(x: Tensor, a: Tensor, b: Tensor, scale: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
    """See `batched_lora`; here x is [N, T, D_in] and index is [N, M]."""
    rows = []
    for row, adapters in enumerate(index.tolist()):
        update = x.new_zeros(x.shape[1], b.shape[1])
        for place, k in enumerate(adapters):
            if k >= 0:
                factor = scale[k] if weight is None else scale[k] * weight[row, place]
                update = update + factor.to(x.dtype) * ((x[row] @ a[k].T) @ b[k].T)
        rows.append(update)
    return torch.stack(rows) if rows else x.new_zeros(*x.shape[:2], b.shape[1])
