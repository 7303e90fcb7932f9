"""Several merges on the same rows: after a few of them those go that are far behind, the rest see as many again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graftory.adapter import Adapter
from graftory.compose.merge.judging import Verdict
from graftory.compose.merge.tuning.portfolio import Floor
from graftory.compose.merge.tuning.seen import Seen
from graftory.compose.merge.tuning.shares import ahead, mean_of, shares_of
from graftory.progress import Progress

FIRST = 16
"""Rows of each task that all are judged on."""
BEHIND = 2.0
"""So many standard errors behind the best, a merge can be told from it."""
LOST = 3.0
"""So many behind, it sees no more rows. Of a dozen merges and few rows, two are behind by luck too often."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """What is judged.

    Attributes:
        name: What the table calls it.
        method: The merge method; None for the bare base.
        floor: Which floor it is, if one.
        adapter: The merge; None for the bare base, and if there is a problem.
        problem: Why it could not be made.
    """

    name: str
    method: str | None
    floor: Floor | None
    adapter: Adapter | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """One row of the table.

    Attributes:
        name: What was tried.
        method: The merge method; None for the bare base.
        floor: Which floor it is, if one.
        score: Mean over tasks of the likelihood, each divided by that of the task's own adapter; None if it could not
            be made. See `Verdict.rows`.
        metrics: The metric of each task, in order.
        behind: How far its score is below the best one of its last rows, and the standard error of that over the rows.
        rows: So many of each task it was judged on, where a task has as many.
        problem: Why it could not be made.
    """

    name: str
    method: str | None
    floor: Floor | None
    score: float | None
    metrics: tuple[float, ...] = ()
    behind: tuple[float, float] | None = None
    rows: int = 0
    problem: str | None = None

    @property
    def near(self) -> bool:
        """Whether its last rows cannot tell it from the best."""
        return self._within(BEHIND)

    @property
    def lost(self) -> bool:
        """Whether it is so far behind that it sees no more rows."""
        return not self._within(LOST)

    def _within(self, errors: float) -> bool:
        return self.behind is not None and self.behind[0] <= errors * self.behind[1]


def race(seen: Seen, entrants: Sequence[Entrant], rows: int, progress: Progress) -> list[Judged]:
    """Judge on 16 rows of each task, on twice as many those that are not lost, until so many are used up.

    The table has the order of the entrants.
    """
    trials = seen.bench.trials
    table = {one.name: Judged(one.name, one.method, one.floor, None, problem=one.problem) for one in entrants}
    left = [one for one in entrants if one.problem is None]
    for look in looks(min(rows, max(len(trial.rows) for trial in trials))):
        verdicts = {}
        for done, one in enumerate(left):
            progress(f"on {look} rows of each task", done, len(left))
            verdicts[one.name] = [seen.verdict(one.adapter, number, look) for number in range(len(trials))]
        own = [seen.verdict(trial.adapter, number, look) for number, trial in enumerate(trials)]
        table |= {row.name: row for row in judged(left, verdicts, own, look)}
        left = [one for one in left if not table[one.name].lost]
        if len(left) == 1:
            break
    return list(table.values())


def looks(most: int) -> list[int]:
    """Numbers of rows: 16, then about twice as many each time, at last all."""
    found = [most]
    while found[0] > FIRST:
        found.insert(0, max(FIRST, -(-found[0] // 2)))
    return found


def judged(
    entrants: Sequence[Entrant], verdicts: Mapping[str, Sequence[Verdict]], own: Sequence[Verdict], rows: int
) -> list[Judged]:
    """Scores, and how far each is behind the best."""
    shares = {
        name: shares_of([verdict.rows for verdict in each], [verdict.rows for verdict in own])
        for name, each in verdicts.items()
    }
    best = max(shares.values(), key=mean_of)
    return [
        Judged(
            one.name,
            one.method,
            one.floor,
            mean_of(shares[one.name]),
            tuple(verdict.value for verdict in verdicts[one.name]),
            ahead(best, shares[one.name]),
            rows,
        )
        for one in entrants
    ]
