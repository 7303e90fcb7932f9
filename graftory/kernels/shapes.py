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


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise a `ValueError` unless a tensor, if there is one, has that shape; the text is only made then."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name}: got {tuple(tensor.shape)}, wanted {shape}")


def as_rows(x: Tensor) -> tuple[Tensor, torch.Size]:
    """View [N, ..., D] as [N, T, D]; also return the shape to go back to."""
    if x.dim() == 3:
        return x, x.shape
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]), x.shape


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
