"""The exact form in which updates are merged: ΔW of a module as a product of two thin matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Delta:
    """ΔW = left right of one linear module; nothing here multiplies it out but `rows` and `dense`.

    Attributes:
        left: [d_out, R].
        right: [R, d_in], of the same type.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """R, the width of the factors; the update's rank may be less."""
        return self.right.shape[0]

    def scaled(self, factor: float) -> Delta:
        """factor ΔW; the factor goes into `left`."""
        return Delta(self.left * factor, self.right)

    def double(self) -> Delta:
        """The same in float64."""
        return Delta(self.left.double(), self.right.double())

    def float(self) -> Delta:
        """The same in float32, each factor in one piece of memory."""
        return Delta(self.left.float().contiguous(), self.right.float().contiguous())

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows of ΔW, [stop - start, d_in]."""
        return self.left[start:stop] @ self.right

    def dense(self) -> Tensor:
        """ΔW itself, [d_out, d_in]: only for those who ask for it."""
        return self.left @ self.right


def total(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """Σ w_t Δ_t with the factors side by side, of rank Σ R_t: no cross terms, nothing rounded away."""
    parts = [delta.scaled(weight) for delta, weight in zip(deltas, weights, strict=True)]
    left = torch.cat([part.left for part in parts], dim=1)
    return Delta(left, torch.cat([part.right for part in parts], dim=0))
