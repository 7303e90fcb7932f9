"""`batched_lora` in torch's own products: gather each row's factors, then two batched products; backward by hand.

The backward that autograd would write keeps the gathered factors of every call alive and adds gradients through
them; by hand S = x Aᵀ is all that is kept. Flat in the number of adapters, and nothing is added in any order.

Sᵀ, Gᵀ and dBᵀ are what is made, tokens along the rows of memory: MKL takes a third of the time that it takes for
their transposes, whose rows are R numbers long.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from graftory.kernels.batched_lora import shared
from graftory.kernels.batched_lora.inputs import Gradients, Inputs, Leave, Needed
from graftory.kernels.gather import (
    factors,
    gather_in,
    gather_out,
    of_places,
    spread,
    to_adapters,
    without,
)
from graftory.kernels.inlet import Product
from graftory.kernels.routing import Routing

__all__ = ["backward", "factors", "forward", "weight_gradient"]


def forward(inputs: Inputs, routing: Routing, onto: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The update [N, T, D_out], and Sᵀ = A xᵀ [N, M R, T], without its factor, for the backward.

    With `onto` it is added to that, in its memory.
    """
    x, a, b, scale, index, weight, _ = inputs
    if routing.one_for_all(a.shape[0]):
        hidden = functional.linear(x, a[0])
        update = functional.linear(hidden * _factor_of_one(scale, weight, x.dtype), b[0])
        return _onto(onto, update), hidden.transpose(1, 2)
    if routing.alike and x.is_cpu:
        update, hidden = shared.forward(inputs, routing)
        return _onto(onto, update), hidden
    if routing.own is not None:
        # what most batches are, and nothing but the products
        hidden = torch.bmm(a.index_select(0, routing.own), x.transpose(1, 2))
        factor = scale.index_select(0, routing.own) if weight is None else _weighted(scale, routing.own, weight)
        factor = factor if factor.dtype == x.dtype else factor.to(x.dtype)
        left = (hidden * factor.view(-1, 1, 1)).transpose(1, 2)
        right = b.index_select(0, routing.own).transpose(1, 2)
        return torch.bmm(left, right) if onto is None else onto.baddbmm_(left, right), hidden
    hidden = torch.bmm(gather_in(a, index), x.transpose(1, 2))
    scaled = hidden * _by_unit(factors(scale, index, weight, x.dtype), a.shape[1])
    update = torch.bmm(scaled.transpose(1, 2), gather_out(b, index).transpose(1, 2))
    if routing.unused is not None:
        hidden = hidden.masked_fill(_by_unit(routing.unused, a.shape[1]), 0.0)
        update = without(update, routing.unused)
    return _onto(onto, update), hidden


def backward(
    grad: Tensor, hidden: Tensor, inputs: Inputs, routing: Routing, needed: Needed, leave: Leave = Product.made
) -> Gradients:
    """Gradients, given that of the update [N, T, D_out] and what `forward` kept.

    With Gᵀ = Bᵀ dYᵀ and f the factor: dX = (f G) A, dA = f Gᵀ x, dBᵀ = f Sᵀ dY, dweight = s Σ G ⊙ S. dX goes by way of
    `leave`, which may keep it for somebody else to multiply out.
    """
    x, a, b, scale, index, weight, _ = inputs
    if routing.one_for_all(a.shape[0]):
        return _backward_of_one(grad, hidden, inputs, needed, leave)
    if routing.alike and x.is_cpu:
        return shared.backward(grad, hidden, inputs, routing, needed, leave)
    rank, unused = a.shape[1], routing.unused
    factor = _by_unit(factors(scale, index, weight, x.dtype), rank)
    grad = grad if unused is None else without(grad, unused)
    inner = torch.bmm(gather_out(b, index).transpose(1, 2), grad.transpose(1, 2))
    inner = inner if unused is None else inner.masked_fill(_by_unit(unused, rank), 0.0)
    scaled = inner * factor
    grad_x = grad_a = grad_b = grad_weight = None
    if needed.x:
        gradient = Product(scaled.transpose(1, 2), gather_in(a, index))
        # what is masked afterwards cannot be left
        grad_x = leave(gradient) if unused is None else without(gradient.made(), unused)
    if needed.a:
        each = torch.bmm(scaled, x).view(index.numel(), rank, x.shape[-1])
        grad_a = to_adapters(each, index, a, full=unused is None)
    if needed.b:
        each = torch.bmm(hidden * factor, grad).view(index.numel(), rank, grad.shape[-1])
        # summed as [K, R, D_out], where each row's is one piece of memory
        like = b.new_empty(len(b), rank, b.shape[1])
        grad_b = to_adapters(each, index, like, full=unused is None).transpose(1, 2)
    if needed.weight:
        grad_weight = weight_gradient(inner.transpose(1, 2), hidden.transpose(1, 2), scale, index)
    return Gradients(grad_x, grad_a, grad_b, grad_weight)


def _backward_of_one(grad: Tensor, hidden: Tensor, inputs: Inputs, needed: Needed, leave: Leave) -> Gradients:
    """The same where every row uses the only adapter: products of matrices."""
    x, a, b, scale, _, weight, _ = inputs
    inner, hidden, factor = grad @ b[0], hidden.transpose(1, 2), _factor_of_one(scale, weight, x.dtype)
    scaled = inner * factor
    return Gradients(
        x=leave(Product(scaled, a[0])) if needed.x else None,
        a=(scaled.flatten(0, 1).T @ x.flatten(0, 1))[None] if needed.a else None,
        b=((hidden * factor).flatten(0, 1).T @ grad.flatten(0, 1)).T[None] if needed.b else None,
        weight=(inner * hidden).sum((1, 2))[:, None] * scale if needed.weight else None,
    )


def _factor_of_one(scale: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """f = s w of the only adapter for each row, [N, 1, 1]; [1] where it is the same for all."""
    factor = scale if weight is None else (scale * weight)[:, :, None]
    return factor if factor.dtype == dtype else factor.to(dtype)


def _onto(onto: Tensor | None, update: Tensor) -> Tensor:
    return update if onto is None else onto.add_(update)


def _weighted(scale: Tensor, own: Tensor, weight: Tensor) -> Tensor:
    return scale.index_select(0, own) * weight[:, 0]


def _by_unit(values: Tensor, rank: int) -> Tensor:
    """[N, M] over the hidden units of each place, to go with [N, M R, T]."""
    return spread(values, rank).transpose(1, 2)


def weight_gradient(inner: Tensor, hidden: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """s Σ_tr G ⊙ S for each row and place, [N, M]; 0 where there is no adapter."""
    products: Tensor = (inner * hidden).unflatten(2, (index.shape[1], -1)).sum((1, 3))
    return products * of_places(scale, index).to(products.dtype)
