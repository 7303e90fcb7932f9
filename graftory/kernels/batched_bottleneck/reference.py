"""`batched_bottleneck` in plain torch: gather each row's matrices, then two batched products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graftory.kernels.shapes import clear_unused


def reference(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: Tensor,
    index: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """See `batched_bottleneck`; here x is [N, T, D].

    `index_select`, not `down[used]`, whose backward adds in any order on several threads.
    """
    used = index.clamp(min=0)
    factor = scale.to(down.dtype)[used][:, None, None]
    hidden = activation(
        torch.baddbmm(down_bias.index_select(0, used).unsqueeze(1), x, down.index_select(0, used).transpose(1, 2))
    )
    output = torch.baddbmm(up_bias.index_select(0, used).unsqueeze(1), hidden, up.index_select(0, used).transpose(1, 2))
    return clear_unused(output * factor, index)
