"""`batched_lora_slices` in torch's own products: `batched_lora`'s, slice after slice; backward by hand."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from graftory.kernels.batched_lora import gathered
from graftory.kernels.batched_lora.inputs import Gradients, Inputs, Needed
from graftory.kernels.routing import Routing


def forward(inputs: Inputs, widths: Sequence[int], routing: Routing) -> tuple[Tensor, Tensor]:
    """The updates side by side, [N, T, Σ D_s], and Sᵀ = A xᵀ of each slice, [S, N, M R, T], for the backward."""
    updates, hidden = zip(*(gathered.forward(each, routing) for each in _slices(inputs, widths)), strict=True)
    return torch.cat(updates, -1), torch.stack(hidden)


def backward(
    grad: Tensor, hidden: Tensor, inputs: Inputs, widths: Sequence[int], routing: Routing, needed: Needed
) -> Gradients:
    """Gradients, given that of the updates and what `forward` kept; those of x and the weights are sums over slices."""
    parts = zip(grad.split(list(widths), -1), hidden, _slices(inputs, widths), strict=True)
    found = [gathered.backward(*each, routing, needed) for each in parts]
    return Gradients(
        x=_sum([each.x for each in found if each.x is not None]),
        a=torch.stack([each.a for each in found if each.a is not None]) if needed.a else None,
        b=torch.cat([each.b for each in found if each.b is not None], 1) if needed.b else None,
        weight=_sum([each.weight for each in found if each.weight is not None]),
    )


def _slices(inputs: Inputs, widths: Sequence[int]) -> Iterator[Inputs]:
    """The inputs of `batched_lora` for each slice."""
    for a, b in zip(inputs.a, inputs.b.split(list(widths), 1), strict=True):
        yield inputs._replace(a=a, b=b, ranks=None)


def _sum(tensors: list[Tensor]) -> Tensor | None:
    """In the order of the slices; None if there is nothing to add up."""
    return functools.reduce(torch.add, tensors) if tensors else None
