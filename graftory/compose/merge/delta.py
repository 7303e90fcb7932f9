"""The exact form in which updates are merged: what an adapter adds to the weight and the bias of one module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scaling:
    """diag(rows) W + W diag(columns): the part of an update that scales the base's own weight, of any rank.

    Attributes:
        weight: W, [d_out, d_in]; the base's own memory, never copied.
        rows: [d_out].
        columns: [d_in].
    """

    weight: Tensor
    rows: Tensor
    columns: Tensor

    def part(self, start: int, stop: int) -> Tensor:
        """Some rows of it, [stop - start, d_in]."""
        weight = self.weight[start:stop].to(self.rows.dtype)
        return self.rows[start:stop, None] * weight + weight * self.columns


@dataclass(frozen=True, slots=True)
class Delta:
    """ΔW = left right + diag(rows) W + W diag(columns), and Δb; only `rows` and `dense` multiply it out.

    Attributes:
        left: [d_out, R]; R may be 0.
        right: [R, d_in], of the same type. A module whose bias alone changes has R = 0, and d_in = 0 stands for any.
        scaling: The part that scales the base's weight, if there is one.
        bias: Δb [d_out], if there is one.
    """

    left: Tensor
    right: Tensor
    scaling: Scaling | None = None
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """R, the width of the factors; the rank of what they make may be less, and that of `scaling` is not counted."""
        return self.right.shape[0]

    @property
    def changes_weight(self) -> bool:
        """Whether there is more than Δb."""
        return self.rank > 0 or self.scaling is not None

    def scaled(self, factor: float) -> Delta:
        """All of it times a factor; in the product it goes into `left`."""
        scaling = self.scaling
        return Delta(
            self.left * factor,
            self.right,
            scaling and replace(scaling, rows=scaling.rows * factor, columns=scaling.columns * factor),
            None if self.bias is None else self.bias * factor,
        )

    def double(self) -> Delta:
        """The same in float64, but for the base's weight."""
        return self._to(torch.float64)

    def float(self) -> Delta:
        """The same in float32, each tensor in one piece of memory."""
        return self._to(torch.float32)

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows of ΔW, [stop - start, d_in]."""
        product = self.left[start:stop] @ self.right
        return product if self.scaling is None else product + self.scaling.part(start, stop)

    def dense(self) -> Tensor:
        """ΔW itself, [d_out, d_in]: only for those who ask for it."""
        return self.rows(0, self.shape[0])

    def factored(self) -> Delta:
        """The same as factors alone: where the base's weight is scaled, as wide as the smaller side of the module."""
        if self.scaling is None:
            return self
        return replace(whole(self.dense()), bias=self.bias)

    def nothing(self) -> Delta:
        """An update of the same module that changes nothing, of rank 0."""
        return Delta(self.left.new_zeros(self.shape[0], 0), self.right.new_zeros(0, self.shape[1]))

    def at_least_one(self) -> Delta:
        """The same with factors of width 1 where there are none: a LoRA has no rank 0."""
        if self.rank:
            return self
        d_out, d_in = self.shape
        return replace(self, left=self.left.new_zeros(d_out, 1), right=self.right.new_zeros(1, d_in))

    def tensors(self) -> list[Tensor]:
        """Everything that the adapter itself brings."""
        vectors = () if self.scaling is None else (self.scaling.rows, self.scaling.columns)
        return [self.left, self.right, *vectors, *(() if self.bias is None else (self.bias,))]

    def _to(self, dtype: torch.dtype) -> Delta:
        left, right = (factor.to(dtype).contiguous() for factor in (self.left, self.right))
        scaling = self.scaling
        return Delta(
            left,
            right,
            scaling and replace(scaling, rows=scaling.rows.to(dtype), columns=scaling.columns.to(dtype)),
            None if self.bias is None else self.bias.to(dtype).contiguous(),
        )


def of_bias(bias: Tensor) -> Delta:
    """Δb alone."""
    return Delta(bias.new_zeros(len(bias), 0), bias.new_zeros(0, 0), bias=bias)


def whole(matrix: Tensor) -> Delta:
    """A matrix as factors, exactly: M times the identity, as wide as the smaller side of M."""
    tall = matrix.shape[0] >= matrix.shape[1]
    one = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    return Delta(matrix, one) if tall else Delta(one, matrix)


def total(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """Σ w_t Δ_t with the factors side by side, of rank Σ R_t, and vectors added: no cross terms, nothing rounded away.

    Args:
        deltas: At least one, all of one module.
        weights: One each.
    """
    parts = [delta.scaled(weight) for delta, weight in zip(deltas, weights, strict=True)]
    scalings = [part.scaling for part in parts if part.scaling is not None]
    biases = [part.bias for part in parts if part.bias is not None]
    width = max(part.shape[1] for part in parts)
    matrices = [part for part in parts if part.shape[1] == width]
    return Delta(
        torch.cat([part.left for part in matrices], dim=1),
        torch.cat([part.right for part in matrices], dim=0),
        Scaling(
            scalings[0].weight,
            torch.stack([one.rows for one in scalings]).sum(0),
            torch.stack([one.columns for one in scalings]).sum(0),
        )
        if scalings
        else None,
        torch.stack(biases).sum(0) if biases else None,
    )
