"""Symmetric matrices as they are stored: the upper triangle alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric [d, d], row by row, [d (d + 1) / 2]."""
    rows, columns = torch.triu_indices(len(matrix), len(matrix)).unbind()
    return matrix[rows, columns].contiguous()


def unpacked(triangle: Tensor) -> Tensor:
    """The inverse of `packed`."""
    width = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    rows, columns = torch.triu_indices(width, width).unbind()
    matrix = triangle.new_zeros(width, width)
    matrix[rows, columns] = triangle
    matrix[columns, rows] = triangle
    return matrix
