"""Several merges on the same rows: after a few of them those go that are far behind, the rest see as many again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from graftory.adapter import Adapter
from graftory.compose.merge.judging import Bench, Verdict
from graftory.compose.merge.tuning.portfolio import Floor
from graftory.progress import Progress
from graftory.training.prediction import Scored

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


def race(bench: Bench, entrants: Sequence[Entrant], progress: Progress) -> list[Judged]:
    """Judge on 16 rows of each task, on twice as many those that are not lost, until the rows are used up.

    The table has the order of the entrants.
    """
    own = _Seen(bench, [trial.adapter for trial in bench.trials])
    seen = {one.name: _Seen(bench, [one.adapter] * len(bench.trials)) for one in entrants if one.problem is None}
    table = {one.name: Judged(one.name, one.method, one.floor, None, problem=one.problem) for one in entrants}
    left = [one for one in entrants if one.name in seen]
    for look in looks(max(len(trial.rows) for trial in bench.trials)):
        verdicts = {}
        for done, one in enumerate(left):
            progress(f"on {look} rows of each task", done, len(left))
            verdicts[one.name] = seen[one.name].until(look)
        table |= {row.name: row for row in judged(left, verdicts, own.until(look), look)}
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


class _Seen:
    """What has become of the rows so far, for an adapter on each trial."""

    def __init__(self, bench: Bench, adapters: Sequence[Adapter | None]) -> None:
        self._bench = bench
        self._adapters = adapters
        self._scored: list[list[Scored]] = [[] for _ in adapters]

    def until(self, rows: int) -> tuple[Verdict, ...]:
        """The verdicts on the first so many; only those that are new are run."""
        for number, (adapter, scored) in enumerate(zip(self._adapters, self._scored, strict=True)):
            more = slice(len(scored), min(rows, len(self._bench.trials[number].rows)))
            if more.start < more.stop:
                scored += self._bench.scored_on(adapter, number, more)
        return tuple(trial.verdict(scored) for trial, scored in zip(self._bench.trials, self._scored, strict=True))


def judged(
    entrants: Sequence[Entrant], verdicts: Mapping[str, Sequence[Verdict]], own: Sequence[Verdict], rows: int
) -> list[Judged]:
    """Scores, and how far each is behind the best."""
    shares = {name: _shares(each, own) for name, each in verdicts.items()}
    best = max(shares.values(), key=_mean)
    return [
        Judged(
            one.name,
            one.method,
            one.floor,
            _mean(shares[one.name]),
            tuple(verdict.value for verdict in verdicts[one.name]),
            _behind(best, shares[one.name]),
            rows,
        )
        for one in entrants
    ]


Shares = Sequence[Sequence[float]]
"""The likelihood of each row of each task, by the mean one of the task's own adapter."""


def _shares(verdicts: Sequence[Verdict], own: Sequence[Verdict]) -> Shares:
    return [
        [row / max(alone.likelihood, 1e-12) for row in verdict.rows]
        for verdict, alone in zip(verdicts, own, strict=True)
    ]


def _mean(shares: Shares) -> float:
    """Over tasks, of the mean over rows."""
    return fmean(fmean(rows) for rows in shares)


def _behind(best: Shares, other: Shares) -> tuple[float, float]:
    """The mean difference, and its standard error √(Σ_t s_t² / n_t) / T, s_t² the variance over the n_t rows of t."""
    gaps = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(best, other, strict=True)]
    spread = sum(variance(rows) / len(rows) for rows in gaps if len(rows) > 1)
    return _mean(gaps), spread**0.5 / len(gaps)
