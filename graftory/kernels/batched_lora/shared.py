"""`batched_lora` in torch's own products where all rows use the same adapters: these are one of all their units.

    S = x A_oᵀ    y = (f S) B_oᵀ    A_o = [A_1; ...; A_M], B_o = [B_1, ..., B_M]

Nothing is gathered for a row, and nothing behind a true rank is read: U units in all. For CPUs: how many there are has
to be known here, for which a GPU would be waited for.
"""

from __future__ import annotations

from torch import Tensor

from graftory.kernels.batched_lora.inputs import Gradients, Inputs, Leave, Needed
from graftory.kernels.inlet import Product
from graftory.kernels.routing import Routing, Units


def forward(inputs: Inputs, routing: Routing) -> tuple[Tensor, Tensor]:
    """The update [N, T, D_out], and Sᵀ, [N, U, T], without its factor, for the backward."""
    units = _units(inputs, routing)
    hidden = inputs.x @ _down(inputs, units).T
    return (hidden * _factor(inputs, units)) @ _up(inputs, units), hidden.transpose(1, 2)


def backward(grad: Tensor, hidden: Tensor, inputs: Inputs, routing: Routing, needed: Needed, leave: Leave) -> Gradients:
    """As `gathered.backward`."""
    units, rows = _units(inputs, routing), inputs.x.flatten(0, 1)
    inner, hidden, factor = grad @ _up(inputs, units).T, hidden.transpose(1, 2), _factor(inputs, units)
    scaled = inner * factor
    grad_a = grad_b = grad_weight = None
    if needed.a:
        grad_a = _scattered(scaled.flatten(0, 1).T @ rows, units, inputs.a.shape)
    if needed.b:
        adapters, outputs, rank = inputs.b.shape
        each = (hidden * factor).flatten(0, 1).T @ grad.flatten(0, 1)
        grad_b = _scattered(each, units, (adapters, rank, outputs)).transpose(1, 2)
    if needed.weight:
        by_unit = (inner * hidden).sum(1)
        by_place = by_unit.new_zeros(inputs.adapter.shape).index_add_(1, units.place, by_unit)
        grad_weight = by_place * inputs.scale[inputs.adapter[0]]
    return Gradients(leave(Product(scaled, _down(inputs, units))) if needed.x else None, grad_a, grad_b, grad_weight)


def _units(inputs: Inputs, routing: Routing) -> Units:
    adapters, most = inputs.adapter[0], inputs.a.shape[1]
    ranks = [most] * len(adapters) if inputs.ranks is None else inputs.ranks[adapters].int().tolist()
    return routing.units(ranks, most)


def _down(inputs: Inputs, units: Units) -> Tensor:
    """A of all units, [U, D_in]."""
    return inputs.a[units.adapter, units.rank]


def _up(inputs: Inputs, units: Units) -> Tensor:
    """Bᵀ of all units, [U, D_out]."""
    return inputs.b[units.adapter, :, units.rank]


def _factor(inputs: Inputs, units: Units) -> Tensor:
    """f = s w of each unit, [N, 1, U]; [1, 1, U] without weights."""
    scale = inputs.scale[units.adapter]
    factor = scale[None] if inputs.weight is None else scale * inputs.weight[:, units.place]
    return factor[:, None].to(inputs.x.dtype)


def _scattered(each: Tensor, units: Units, shape: tuple[int, ...]) -> Tensor:
    """[U, D] at the units' places in [K, R, D], zeros elsewhere."""
    adapters, rank, width = shape
    flat = each.new_zeros(adapters * rank, width).index_add_(0, units.adapter * rank + units.rank, each)
    return flat.view(adapters, rank, width)
