"""What of the tasks' own adapters another one keeps, row by row, and how sure a difference is."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, variance

Shares = Sequence[Sequence[float]]
"""The figure of each row of each task, by the mean one of the task's own adapter."""


def shares_of(rows: Shares, own: Shares) -> Shares:
    """Of the figures of an adapter, and of those of each task's own adapter on the same rows."""
    return [[row / max(fmean(alone), 1e-12) for row in each] for each, alone in zip(rows, own, strict=True)]


def mean_of(shares: Shares) -> float:
    """Over tasks, of the mean over rows."""
    return fmean(fmean(rows) for rows in shares)


def ahead(one: Shares, other: Shares) -> tuple[float, float]:
    """The mean difference, and its standard error √(Σ_t s_t² / n_t) / T, s_t² the variance over the n_t rows of t."""
    gaps = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(one, other, strict=True)]
    spread = sum(variance(rows) / len(rows) for rows in gaps if len(rows) > 1)
    return mean_of(gaps), spread**0.5 / len(gaps)
