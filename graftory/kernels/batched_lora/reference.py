"""`batched_lora` in plain torch: gather each row's factors, then two batched products."""

from __future__ import annotations

import torch
from torch import Tensor

from graftory.kernels.shapes import clear_unused


def reference(x: Tensor, a: Tensor, b: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """See `batched_lora`; here x is [N, T, D_in].

    `index_select`, not `a[used]`, whose backward adds in any order on several threads.
    """
    used = index.clamp(min=0)
    factor = scale.to(a.dtype)[used][:, None, None]
    if a.shape[0] == 1:
        update = ((x @ a[0].T) * factor) @ b[0].T
    else:
        hidden = torch.bmm(x, a.index_select(0, used).transpose(1, 2)) * factor
        update = torch.bmm(hidden, b.index_select(0, used).transpose(1, 2))
    return clear_unused(update, index)
