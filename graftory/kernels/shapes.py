"""Checks and shape helpers that the operations share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def check(condition: bool, text: str) -> None:
    """Raise a `ValueError` with `text` unless `condition` holds."""
    if not condition:
        raise ValueError(text)


def as_rows(x: Tensor) -> tuple[Tensor, torch.Size]:
    """View [N, ..., D] as [N, T, D]; also return the shape to go back to."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]), x.shape


def clear_unused(update: Tensor, index: Tensor) -> Tensor:
    """Exact zeros where `index` is -1, [N, ...] by [N].

    Not a product with zero: an adapter that holds NaN must not reach rows that do not use it. On the CPU, where
    looking is free, nothing is done if every row has an adapter.
    """
    unused = index < 0
    if unused.device.type == "cpu" and not bool(unused.any()):
        return update
    return update.masked_fill(unused.view(-1, *[1] * (update.dim() - 1)), 0.0)


def stack_padded(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Stack matrices that differ in size along `dim` alone, with zeros behind the shorter ones.

    Zeros are exact: a padded hidden unit has zero weights in and out, so it adds nothing.
    """
    if len(tensors) == 1:
        return tensors[0].unsqueeze(0)
    longest = max(tensor.shape[dim] for tensor in tensors)
    behind = 2 * (tensors[0].dim() - 1 - dim % tensors[0].dim())
    padded = [
        functional.pad(tensor, [0] * behind + [0, longest - tensor.shape[dim]])
        if tensor.shape[dim] < longest
        else tensor
        for tensor in tensors
    ]
    return torch.stack(padded)
