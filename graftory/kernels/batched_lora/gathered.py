"""`batched_lora` in torch's own products: gather each row's factors, then two batched products; backward by hand.

The backward that autograd would write keeps the gathered factors of every call alive and adds gradients through
them; by hand S = x Aᵀ is all that is kept. Flat in the number of adapters, and nothing is added in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graftory.kernels.batched_lora.inputs import Gradients, Inputs, Needed


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The update [N, T, D_out], and S = x Aᵀ [N, T, M R], without its factor, for the backward."""
    x, a, b, scale, index, weight, _ = inputs
    factor = factors(scale, index, weight, x.dtype)
    if one_for_all(a, index):
        hidden = x @ a[0].T
        return (hidden * factor[:, :, None]) @ b[0].T, hidden
    hidden = torch.bmm(x, _gather_a(a, index).transpose(1, 2))
    update = torch.bmm(hidden * spread(factor, a.shape[1]), _gather_b(b, index).transpose(1, 2))
    unused = index < 0
    if _any(unused):
        hidden = hidden.masked_fill(spread(unused, a.shape[1]), 0.0)
        update = _without(update, unused)
    return update, hidden


def backward(grad: Tensor, hidden: Tensor, inputs: Inputs, needed: Needed) -> Gradients:
    """Gradients, given that of the update [N, T, D_out] and what `forward` kept.

    With G = dY B and f the factor: dX = (f G) A, dA = (f G)ᵀ x, dB = dYᵀ (f S), dweight = s Σ G ⊙ S.
    """
    x, a, b, scale, index, weight, _ = inputs
    rank, places = a.shape[1], index.shape[1]
    factor = spread(factors(scale, index, weight, x.dtype), rank)
    if one_for_all(a, index):
        return _backward_of_one(grad, hidden, inputs, factor, needed)
    unused = index < 0
    none = not _any(unused)
    grad = grad if none else _without(grad, unused)
    inner = torch.bmm(grad, _gather_b(b, index))
    inner = inner if none else inner.masked_fill(spread(unused, rank), 0.0)
    scaled = inner * factor
    grad_x = grad_a = grad_b = grad_weight = None
    if needed.x:
        grad_x = torch.bmm(scaled, _gather_a(a, index))
        grad_x = grad_x if none else _without(grad_x, unused)
    if needed.a:
        each = torch.bmm(scaled.transpose(1, 2), x).view(index.numel(), rank, x.shape[-1])
        grad_a = _to_adapters(each, index, a)
    if needed.b:
        each = torch.bmm(grad.transpose(1, 2), hidden * factor)
        grad_b = _to_adapters(each.view(*each.shape[:2], places, rank).transpose(1, 2).flatten(0, 1), index, b)
    if needed.weight:
        grad_weight = weight_gradient(inner, hidden, scale, index)
    return Gradients(grad_x, grad_a, grad_b, grad_weight)


def _backward_of_one(grad: Tensor, hidden: Tensor, inputs: Inputs, factor: Tensor, needed: Needed) -> Gradients:
    """The same where every row uses the only adapter: products of matrices."""
    x, a, b, scale, *_ = inputs
    inner = grad @ b[0]
    scaled = inner * factor
    return Gradients(
        x=scaled @ a[0] if needed.x else None,
        a=(scaled.flatten(0, 1).T @ x.flatten(0, 1))[None] if needed.a else None,
        b=(grad.flatten(0, 1).T @ (hidden * factor).flatten(0, 1))[None] if needed.b else None,
        weight=(inner * hidden).sum((1, 2))[:, None] * scale if needed.weight else None,
    )


def weight_gradient(inner: Tensor, hidden: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """s Σ_tr G ⊙ S for each row and place, [N, M]; 0 where there is no adapter."""
    products: Tensor = (inner * hidden).unflatten(2, (index.shape[1], -1)).sum((1, 3))
    return products * scale.index_select(0, index.clamp(min=0).flatten()).view_as(index).to(products.dtype)


def factors(scale: Tensor, index: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """f = s_k w for each row and place, [N, M]; anything finite where there is no adapter."""
    factor = scale.index_select(0, index.clamp(min=0).flatten()).view_as(index)
    return (factor if weight is None else factor * weight).to(dtype)


def spread(values: Tensor, rank: int) -> Tensor:
    """[N, M] over the hidden units of each place, [N, 1, M R]."""
    return values.repeat_interleave(rank, 1)[:, None, :]


def one_for_all(a: Tensor, index: Tensor) -> bool:
    """Whether every row uses the only adapter there is; a device is not asked, as it would be waited for."""
    return a.shape[0] == 1 and index.shape[1] == 1 and index.device.type == "cpu" and not bool((index < 0).any())


def _gather_a(a: Tensor, index: Tensor) -> Tensor:
    """[N, M R, D_in]; zeros where a mixture has no adapter, so that nothing of another one comes in."""
    gathered = a.index_select(0, index.clamp(min=0).flatten()).view(len(index), index.shape[1] * a.shape[1], a.shape[2])
    return gathered if index.shape[1] == 1 else _cleared(gathered, index, a.shape[1])


def _gather_b(b: Tensor, index: Tensor) -> Tensor:
    """[N, D_out, M R]."""
    rows, places = index.shape
    gathered = b.index_select(0, index.clamp(min=0).flatten())
    if places == 1:
        return gathered
    beside = gathered.view(rows, places, *b.shape[1:]).transpose(1, 2).flatten(2)
    return _cleared(beside.transpose(1, 2), index, b.shape[2]).transpose(1, 2)


def _cleared(gathered: Tensor, index: Tensor, rank: int) -> Tensor:
    unused = index < 0
    return gathered.masked_fill(spread(unused, rank).transpose(1, 2), 0.0) if _any(unused) else gathered


def _to_adapters(each: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """The gradients of rows and places, [N M, ...], summed for each adapter, row after row."""
    flat = index.flatten()
    if _any(flat < 0):
        each = each.masked_fill((flat < 0)[:, None, None], 0.0)
    return torch.zeros_like(like).index_add_(0, flat.clamp(min=0), each)


def _without(values: Tensor, unused: Tensor) -> Tensor:
    """Exact zeros in rows that have no adapter at any place."""
    return values.masked_fill(unused.all(1)[:, None, None], 0.0)


def _any(mask: Tensor) -> bool:
    """Whether something is to be masked. On the CPU looking is free; elsewhere it would wait for the device."""
    return mask.device.type != "cpu" or bool(mask.any())
