"""What a sequence of tasks comes to: seven numbers over the matrix R, formulas as in docs/continual.md.

R[i][j] is the score on task j after training task i (both from 0 here, from 1 in the formulas). Libraries
differ in these: Avalanche's forgetting has no maximum, Mammoth's includes the last row, Continuum's
backward transfer averages all pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graftory.errors import ShapeError

Matrix = Sequence[Sequence[float]]
"""R, square: a row per trained task, a column per evaluated task."""


@dataclass(frozen=True, slots=True)
class Summary:
    """All that can be said of one matrix; None where a number is not defined or its input is missing."""

    acc: float
    aaa: float
    bwt: float | None
    forgetting: float | None
    fwt: float | None = None
    transfer: float | None = None
    intransigence: float | None = None


def summarise(
    matrix: Matrix,
    *,
    untrained: Sequence[float] | None = None,
    single: Sequence[float] | None = None,
    joint: Sequence[float] | None = None,
) -> Summary:
    """Compute every metric whose inputs are given.

    Args:
        matrix: R.
        untrained: b_j, the score on j before any training (for FWT).
        single: S_j, the score of a model trained on j alone (for Transfer).
        joint: J_j, the score on j of a model trained on tasks ≤ j together (for Intransigence).

    Raises:
        ShapeError: If the matrix is not square or a list has another length.
    """
    several = len(matrix) > 1
    return Summary(
        acc=accuracy(matrix),
        aaa=average_anytime_accuracy(matrix),
        bwt=backward_transfer(matrix) if several else None,
        forgetting=forgetting(matrix) if several else None,
        fwt=forward_transfer(matrix, untrained) if several and untrained is not None else None,
        transfer=None if single is None else transfer(matrix, single),
        intransigence=None if joint is None else intransigence(matrix, joint),
    )


def accuracy(matrix: Matrix) -> float:
    """ACC = (1/T) Σ_j R_Tj: the mean over all tasks at the end (Lopez-Paz & Ranzato 2017, arXiv:1706.08840)."""
    _check(matrix)
    return _mean(matrix[-1])


def average_anytime_accuracy(matrix: Matrix) -> float:
    """AAA = (1/T) Σ_i (1/i) Σ_{j≤i} R_ij: the mean over the tasks seen so far, averaged over time."""
    _check(matrix)
    return _mean([_mean(row[: i + 1]) for i, row in enumerate(matrix)])


def backward_transfer(matrix: Matrix) -> float:
    """BWT = 1/(T−1) Σ_{j<T} (R_Tj − R_jj): below 0 where later tasks did harm (arXiv:1706.08840)."""
    last = _last_of_several(matrix)
    return _mean([matrix[last][j] - matrix[j][j] for j in range(last)])


def forgetting(matrix: Matrix) -> float:
    """F = 1/(T−1) Σ_{j<T} (max_{j≤i<T} R_ij − R_Tj) (Chaudhry et al. 2018, arXiv:1801.10112)."""
    last = _last_of_several(matrix)
    return _mean([max(matrix[i][j] for i in range(j, last)) - matrix[last][j] for j in range(last)])


def forward_transfer(matrix: Matrix, untrained: Sequence[float]) -> float:
    """FWT = 1/(T−1) Σ_{j≥2} (R_{j−1,j} − b_j): what earlier tasks give a task before its own training."""
    last = _last_of_several(matrix)
    _check(matrix, untrained)
    return _mean([matrix[j - 1][j] - untrained[j] for j in range(1, last + 1)])


def transfer(matrix: Matrix, single: Sequence[float]) -> float:
    """Transfer = mean_j (R_jj − S_j): learning in the sequence against learning alone."""
    _check(matrix, single)
    return _mean([matrix[j][j] - value for j, value in enumerate(single)])


def intransigence(matrix: Matrix, joint: Sequence[float]) -> float:
    """Intransigence = mean_j (J_j − R_jj): how far joint training is ahead (arXiv:1801.10112)."""
    _check(matrix, joint)
    return _mean([value - matrix[j][j] for j, value in enumerate(joint)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _check(matrix: Matrix, *lists: Sequence[float]) -> None:
    n = len(matrix)
    if n == 0 or any(len(row) != n for row in matrix):
        raise ShapeError(f"the matrix has rows of lengths {[len(row) for row in matrix]}, wanted a square")
    for values in lists:
        if len(values) != n:
            raise ShapeError(f"got {len(values)} values for {n} tasks, wanted one each")


def _last_of_several(matrix: Matrix) -> int:
    _check(matrix)
    if len(matrix) < 2:
        raise ShapeError("one task has no transfer or forgetting; give at least two")
    return len(matrix) - 1
