"""What is left of each adapter's score when the merged adapter takes its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graftory.adapter import Adapter
from graftory.compose.merge.judging import Bench, Verdict


@dataclass(frozen=True, slots=True)
class Retention:
    """One task, read with its own head.

    Attributes:
        adapter: The adapter that was trained on it.
        task: The task.
        metric: Its metric.
        rows: How many rows.
        base: What the bare base scores.
        own: What the adapter scores.
        merged: What the merged adapter scores.
        retained: merged / own, or own / merged where lower is better; None if a score is not above 0.
    """

    adapter: str
    task: str
    metric: str
    rows: int
    base: float
    own: float
    merged: float
    retained: float | None


def retention(bench: Bench, merged: Adapter) -> tuple[Retention, ...]:
    """Measure the bare base, each adapter and the merged adapter on the rows of each adapter's task.

    Raises:
        BaseMismatchError: If an adapter belongs to another base.
    """
    found = []
    for number, trial in enumerate(bench.trials):
        base, own, after = (bench.judge_on(one, number) for one in (None, trial.adapter, merged))
        rows = len(trial.rows)
        values = (base.value, own.value, after.value)
        found.append(Retention(trial.name, trial.task.name, own.metric, rows, *values, retained(own, after)))
    return tuple(found)


def retained(own: Verdict, after: Verdict) -> float | None:
    """The normalised score: the merged adapter's by the adapter's own."""
    above, below = (own.value, after.value) if own.lower_is_better else (after.value, own.value)
    return above / below if above >= 0 and below > 0 else None


def worst(found: Sequence[Retention]) -> Retention | None:
    """The task of which least is left."""
    known = [one for one in found if one.retained is not None]
    return min(known, key=lambda one: one.retained or 0.0, default=None)
