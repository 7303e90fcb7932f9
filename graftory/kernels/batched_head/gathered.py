"""`batched_head` in torch's own products: gather each row's head, then one batched product; backward by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from graftory.kernels.batched_head.inputs import Gradients, Inputs, Needed
from graftory.kernels.gather import any_of, gather_in, gather_vectors, of_places, to_adapters


def forward(inputs: Inputs, fill: float) -> Tensor:
    """The logits, [N, T, O]."""
    x, weight, bias, index, _ = inputs
    matrices = gather_in(weight, index[:, None]).transpose(1, 2)
    if bias is None:
        logits = torch.bmm(x, matrices)
    else:
        logits = torch.baddbmm(gather_vectors(bias, index[:, None]), x, matrices)
    return logits.masked_fill(_padding(inputs), fill)


def backward(grad: Tensor, inputs: Inputs, needed: Needed) -> Gradients:
    """Gradients, given that of the logits: with G what is not padding of it, dX = G W, dW = Gᵀ x, db = Σ G."""
    x, weight, bias, index, sizes = inputs
    padding = _padding(inputs)
    grad = grad.masked_fill(padding, 0.0)
    grad_x = grad_weight = grad_bias = None
    if needed.x:
        matrices = gather_in(weight, index[:, None])
        # zero times what lies behind a size might be NaN
        matrices = matrices.masked_fill(padding.transpose(1, 2), 0.0) if any_of(padding) else matrices
        grad_x = torch.bmm(grad, matrices)
    if needed.weight:
        grad_weight = _summed(torch.bmm(grad.transpose(1, 2), x), index, weight)
        behind = _behind(weight, sizes)
        grad_weight = grad_weight.masked_fill(behind[:, :, None], 0.0) if any_of(behind) else grad_weight
    if needed.bias and bias is not None:
        grad_bias = _summed(grad.sum(1), index, bias)
    return Gradients(grad_x, grad_weight, grad_bias)


def _behind(weight: Tensor, sizes: Tensor) -> Tensor:
    """Which outputs are behind a head's size, [K, O]."""
    return torch.arange(weight.shape[1], device=weight.device) >= sizes[:, None]


def _padding(inputs: Inputs) -> Tensor:
    """Which logits are behind a row's head, [N, 1, O]; all of them without one."""
    index = inputs.head[:, None]
    sizes = torch.where(index < 0, 0, of_places(inputs.sizes, index))
    return _behind(inputs.weight, sizes[:, 0])[:, None]


def _summed(each: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """The gradients of rows, summed for each head in fp32 at least."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return to_adapters(each.to(wide), index, torch.empty_like(like, dtype=wide)).to(like.dtype)
