"""What the operations in torch's own products share: each row's matrices beside each other, and the way back.

A row of a batch has M places, each an adapter or none; the R hidden units of its places lie side by side, M R in all.
Nothing is added in any order, and a place without an adapter sees zeros, whatever other adapters hold.
"""

from __future__ import annotations

import torch
from torch import Tensor


def factors(scale: Tensor, index: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """f = s_k w for each row and place, [N, M]; anything finite where there is no adapter."""
    factor = of_places(scale, index)
    return (factor if weight is None else factor * weight).to(dtype)


def of_places(scale: Tensor, index: Tensor) -> Tensor:
    """s_k of each row and place, [N, M]; anything finite where there is no adapter."""
    return scale.index_select(0, index.clamp(min=0).flatten()).view_as(index)


def spread(values: Tensor, rank: int) -> Tensor:
    """[N, M] over the hidden units of each place, to multiply with [N, T, M R]."""
    return (values if values.shape[1] == 1 else values.repeat_interleave(rank, 1))[:, None, :]


def gather_in(matrices: Tensor, index: Tensor) -> Tensor:
    """[K, R, D] as [N, M R, D]; zeros where a mixture has no adapter, so that nothing of another one comes in."""
    _, rank, width = matrices.shape
    gathered = matrices.index_select(0, index.clamp(min=0).flatten()).view(len(index), index.shape[1] * rank, width)
    return gathered if index.shape[1] == 1 else _cleared(gathered, index, rank)


def gather_out(matrices: Tensor, index: Tensor) -> Tensor:
    """[K, D, R] as [N, D, M R]; zeros as in `gather_in`."""
    rows, places = index.shape
    gathered = matrices.index_select(0, index.clamp(min=0).flatten())
    if places == 1:
        return gathered
    beside = gathered.view(rows, places, *matrices.shape[1:]).transpose(1, 2).flatten(2)
    return _cleared(beside.transpose(1, 2), index, matrices.shape[2]).transpose(1, 2)


def gather_vectors(vectors: Tensor, index: Tensor) -> Tensor:
    """[K, D] as [N, M, D]; zeros where there is no adapter."""
    gathered = vectors.index_select(0, index.clamp(min=0).flatten()).view(*index.shape, vectors.shape[1])
    unused = index < 0
    return gathered.masked_fill(unused[:, :, None], 0.0) if any_of(unused) else gathered


def _cleared(gathered: Tensor, index: Tensor, rank: int) -> Tensor:
    unused = index < 0
    return gathered.masked_fill(spread(unused, rank).transpose(1, 2), 0.0) if any_of(unused) else gathered


def to_adapters(each: Tensor, index: Tensor, like: Tensor, *, full: bool = False) -> Tensor:
    """The gradients of rows and places, [N M, ...], summed for each adapter, row after row; `full` if it is known that
    each place has one.
    """
    flat = index.flatten()
    if full:
        return torch.zeros_like(like).index_add_(0, flat, each)
    if any_of(flat < 0):
        each = each.masked_fill((flat < 0).view(-1, *[1] * (each.dim() - 1)), 0.0)
    return torch.zeros_like(like).index_add_(0, flat.clamp(min=0), each)


def without(values: Tensor, unused: Tensor) -> Tensor:
    """Exact zeros in rows of [N, T, D] that have no adapter at any place; `unused` is [N, M]."""
    return values.masked_fill(unused.all(1)[:, None, None], 0.0)


def any_of(mask: Tensor) -> bool:
    """Whether something is to be masked. On the CPU looking is free; elsewhere it would wait for the device."""
    return mask.device.type != "cpu" or bool(mask.any())
