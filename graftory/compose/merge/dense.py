"""Matrices too large to be there several times: made in blocks of rows, and the merged one turned into factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftory.compose.merge.delta import Delta, whole

BLOCK = 1 << 22
"""Most numbers in a block, of all matrices together: 16 MB of fp32."""


@dataclass(frozen=True, slots=True)
class Stack:
    """T matrices of one shape, of which some rows at a time are made.

    Attributes:
        count: T.
        shape: (rows, columns) of each.
        rows: Makes rows start to stop of all, [T, stop - start, columns].
    """

    count: int
    shape: tuple[int, int]
    rows: Callable[[int, int], Tensor]

    def blocks(self) -> Iterator[Tensor]:
        """All rows in order, [T, n, columns] at a time."""
        height, width = self.shape
        step = max(1, BLOCK // (self.count * width))
        for start in range(0, height, step):
            yield self.rows(start, min(start + step, height))


def stack_of_deltas(deltas: Sequence[Delta]) -> Stack:
    """The updates ΔW_t of one module."""

    def rows(start: int, stop: int) -> Tensor:
        return torch.stack([delta.rows(start, stop) for delta in deltas])

    return Stack(len(deltas), deltas[0].shape, rows)


def stack_of_tensor(matrices: Tensor) -> Stack:
    """Matrices that are there already, [T, rows, columns]."""

    def rows(start: int, stop: int) -> Tensor:
        return matrices[:, start:stop]

    return Stack(matrices.shape[0], (matrices.shape[1], matrices.shape[2]), rows)


def low_rank(matrix: Tensor, rank: int | None) -> Delta:
    """A matrix as factors: its best approximation of a rank, or exactly if no lesser rank is asked for.

    The first r right singular vectors V are the eigenvectors of MᵀM with the largest eigenvalues, and M V Vᵀ is the
    best approximation; of M and Mᵀ the one with the smaller Gram matrix is taken. In float64, so directions
    down to 1e-8 of the largest singular value are told apart. Exactly means M times the identity, as wide as the
    smaller side of M.

    Args:
        matrix: [d_out, d_in].
        rank: r, or None.
    """
    if matrix.shape[0] < matrix.shape[1]:
        turned = low_rank(matrix.T, rank)
        return Delta(turned.right.T, turned.left.T)
    width = matrix.shape[1]
    if rank is None or rank >= width:
        return whole(matrix)
    step = max(1, BLOCK // width)
    gram = torch.zeros(width, width, dtype=torch.float64)
    for block in matrix.split(step):
        gram += block.double().T @ block.double()
    vectors = _leading(gram, rank)
    left = torch.cat([block.double() @ vectors for block in matrix.split(step)])
    norms = left.norm(dim=0)
    root = torch.where(norms > 0, norms, torch.ones_like(norms)).sqrt()
    return Delta(left / root, root[:, None] * vectors.T)


def _leading(gram: Tensor, count: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, the largest first, [n, count]; on one thread, see `merge`."""
    import scipy.linalg
    from threadpoolctl import threadpool_limits

    size = gram.shape[0]
    with threadpool_limits(1):
        _, vectors = scipy.linalg.eigh(gram.numpy(), subset_by_index=[size - count, size - 1])
    return torch.from_numpy(vectors).flip(1)
