"""`batched_lora` in plain torch: gather each row's factors, then two batched products."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(x: Tensor, a: Tensor, b: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """See `batched_lora`; here x is [N, T, D_in]."""
    used = index.clamp(min=0)
    factor = torch.where(index >= 0, scale.to(a.dtype)[used], 0.0)
    if a.shape[0] == 1:
        hidden = x @ a[0].T
        return (hidden @ b[0].T) * factor[:, None, None]
    hidden = torch.bmm(x, a[used].transpose(1, 2)) * factor[:, None, None]
    return torch.bmm(hidden, b[used].transpose(1, 2))
