"""`batched_bottleneck` in torch's own products: gather each row's matrices, two batched products; backward by hand.

What autograd would keep of every call are the gathered matrices; by hand Z = x Dᵀ + c is all that is kept, and the
activation is computed again. Flat in the number of adapters, and nothing is added in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from graftory.kernels.activations import ACTIVATIONS
from graftory.kernels.batched_bottleneck.inputs import Gradients, Inputs, Needed
from graftory.kernels.gather import (
    factors,
    gather_in,
    gather_out,
    gather_vectors,
    of_places,
    spread,
    to_adapters,
    without,
)
from graftory.kernels.routing import Routing


def forward(inputs: Inputs, activation: str, routing: Routing) -> tuple[Tensor, Tensor]:
    """The update [N, T, D], and Z = x Dᵀ + c [N, T, M R] for the backward; in rows without an adapter it may be any."""
    x, down, down_bias, up, up_bias, scale, index, weight, keep, _ = inputs
    act, factor = ACTIVATIONS[activation].function, factors(scale, index, weight, x.dtype)
    if routing.one_for_all(len(down)):
        before = functional.linear(x, down[0], down_bias[0])
        hidden = kept(act(before), keep) * factor[:, :, None]
        if weight is None:
            return functional.linear(hidden, up[0], up_bias[0] * scale.to(x.dtype)), before
        return functional.linear(hidden, up[0]).add_(factor[:, :, None] * up_bias), before
    shift = gather_vectors(down_bias, index).flatten(1)[:, None]
    before = torch.baddbmm(shift, x, gather_in(down, index).transpose(1, 2))
    hidden = kept(act(before), keep) * spread(factor, down.shape[1])
    constant = gather_vectors(up_bias, index) * factor[:, :, None]
    constant = constant if index.shape[1] == 1 else constant.sum(1, keepdim=True)
    update = torch.baddbmm(constant, hidden, gather_out(up, index).transpose(1, 2))
    return update if routing.unused is None else without(update, routing.unused), before


def backward(
    grad: Tensor, before: Tensor, inputs: Inputs, activation: str, routing: Routing, needed: Needed
) -> Gradients:
    """Gradients, given that of the update [N, T, D] and what `forward` kept.

    With H = keep ⊙ act(Z), G = dY U, f the factor and dZ = f G ⊙ keep ⊙ act'(Z): dX = dZ D, dD = dZᵀ x, dc = Σ dZ,
    dU = dYᵀ (f H), de = Σ f dY, dweight = s (Σ G ⊙ H + Σ dY e).
    """
    x, down, down_bias, up, up_bias, scale, index, weight, keep, _ = inputs
    factor = factors(scale, index, weight, x.dtype)
    if routing.one_for_all(len(down)):
        return _backward_of_one(grad, before, inputs, activation, needed)
    size, places, unused = down.shape[1], index.shape[1], routing.unused
    act, chain = ACTIVATIONS[activation]
    inner, by_unit = torch.bmm(grad, gather_out(up, index)), spread(factor, size)
    # where there is no adapter these may be any: nothing of them is handed on
    hidden, outer = kept(act(before), keep), chain(kept(inner * by_unit, keep), before)
    grad_x = grad_down = grad_down_bias = grad_up = grad_up_bias = grad_weight = None
    if needed.x:
        grad_x = torch.bmm(outer, gather_in(down, index))
        grad_x = grad_x if unused is None else without(grad_x, unused)
    if needed.down:
        each = torch.bmm(outer.transpose(1, 2), x).view(index.numel(), size, x.shape[-1])
        grad_down = to_adapters(each, index, down, full=unused is None)
    if needed.down_bias:
        grad_down_bias = to_adapters(outer.sum(1).view(index.numel(), size), index, down_bias, full=unused is None)
    if needed.up:
        each = torch.bmm(grad.transpose(1, 2), hidden * by_unit)
        each = each.view(*each.shape[:2], places, size).transpose(1, 2).flatten(0, 1)
        grad_up = to_adapters(each, index, up, full=unused is None)
    if needed.up_bias:
        each = (factor[:, :, None] * grad.sum(1)[:, None]).flatten(0, 1)
        grad_up_bias = to_adapters(each, index, up_bias, full=unused is None)
    if needed.weight:
        products = (inner * hidden).unflatten(2, (places, size)).sum((1, 3))
        products += (gather_vectors(up_bias, index) * grad.sum(1)[:, None]).sum(2)
        grad_weight = products * of_places(scale, index).to(products.dtype)
        grad_weight = grad_weight if unused is None else grad_weight.masked_fill(unused, 0.0)
    return Gradients(grad_x, grad_down, grad_down_bias, grad_up, grad_up_bias, grad_weight)


def _backward_of_one(grad: Tensor, before: Tensor, inputs: Inputs, activation: str, needed: Needed) -> Gradients:
    """The same where every row uses the only adapter: products of matrices."""
    x, down, _, up, up_bias, scale, index, weight, keep, _ = inputs
    factor = factors(scale, index, weight, x.dtype)
    act, chain = ACTIVATIONS[activation]
    inner = grad @ up[0]
    hidden, outer = kept(act(before), keep), chain(kept(inner * factor[:, :, None], keep), before)
    flat, rows = grad.flatten(0, 1), outer.flatten(0, 1)
    return Gradients(
        x=outer @ down[0] if needed.x else None,
        down=(rows.T @ x.flatten(0, 1))[None] if needed.down else None,
        down_bias=rows.sum(0)[None] if needed.down_bias else None,
        up=(flat.T @ (hidden * factor[:, :, None]).flatten(0, 1))[None] if needed.up else None,
        up_bias=(factor * grad.sum(1)).sum(0)[None] if needed.up_bias else None,
        weight=((inner * hidden).sum((1, 2)) + grad.sum(1) @ up_bias[0])[:, None] * scale if needed.weight else None,
    )


def kept(hidden: Tensor, keep: Tensor | None) -> Tensor:
    """The hidden units, or their gradients, times their multipliers."""
    return hidden if keep is None else hidden * keep
