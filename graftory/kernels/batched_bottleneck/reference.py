"""`batched_bottleneck` as its formula reads, row by row: what every other path is held against. Slow."""

from __future__ import annotations

import torch
from torch import Tensor

from graftory.kernels.activations import ACTIVATIONS
from graftory.kernels.batched_bottleneck.inputs import Inputs


def reference(inputs: Inputs, activation: str) -> Tensor:
    """See `batched_bottleneck`; here x is [N, T, D], index [N, M] and keep [N, T, M R]."""
    x, down, down_bias, up, up_bias, scale, index, weight, keep, _ = inputs
    act, size = ACTIVATIONS[activation].function, down.shape[1]
    rows = []
    for row, adapters in enumerate(index.tolist()):
        update = torch.zeros_like(x[row])
        for place, k in enumerate(adapters):
            if k >= 0:
                hidden = act(x[row] @ down[k].T + down_bias[k])
                if keep is not None:
                    hidden = hidden * keep[row, :, place * size : (place + 1) * size]
                factor = scale[k] if weight is None else scale[k] * weight[row, place]
                update = update + factor.to(x.dtype) * (hidden @ up[k].T + up_bias[k])
        rows.append(update)
    return torch.stack(rows) if rows else torch.zeros_like(x)
