"""Which method to merge by: a portfolio judged on a few rows of every task, against what costs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean, variance
from typing import Any, Literal

from torch import Tensor

from graftory.adapter import Adapter, Parent
from graftory.compose.merge import METHODS, merge, needs_base
from graftory.compose.merge.base import MergeParameters
from graftory.compose.merge.judging import Bench, Verdict, trials_of
from graftory.compose.merge.tuning.parameters import AutoParameters
from graftory.compose.record import record_examples
from graftory.errors import MergeError
from graftory.schema import Json, encode
from graftory.settings import SelectSettings

ROWS = 16
"""Rows of each task that decide."""
ERRORS = 2.0
"""So many standard errors behind the best, a merge cannot be told from it."""

Floor = Literal["nothing", "single", "task arithmetic"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to merge.

    Attributes:
        name: What the table calls it.
        method: A row of `METHODS`.
        weight: The same for every adapter; None for the method's own.
        values: Parameters of the method that are not its defaults.
        floor: Whether it is one of what others are held against.
    """

    name: str
    method: str
    weight: float | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    floor: Floor | None = None


PORTFOLIO: tuple[Candidate, ...] = (
    Candidate("pico", "pico"),
    Candidate("regmean", "regmean"),
    Candidate("tsv", "tsv"),
    Candidate("linear, mean", "linear", floor="task arithmetic"),
    Candidate("ties", "ties"),
    Candidate("iso_c", "iso_c"),
    Candidate("core", "core"),
    Candidate("knots", "knots"),
    Candidate("ctm", "ctm"),
    Candidate("lego", "lego"),
    Candidate("linear, sum", "linear", 1.0, floor="task arithmetic"),
    Candidate("fisher", "fisher"),
)
"""What is tried. Of those that the rows cannot tell from the best the first is taken, so the order is what is known
without them: how the methods did on the merges of benchmarks/results/merging.md, about.
"""


@dataclass(frozen=True, slots=True)
class Judged:
    """One row of the table.

    Attributes:
        name: What was tried.
        method: The merge method; None for the bare base.
        floor: Which floor it is, if one.
        score: Mean over tasks of the likelihood, each divided by that of the task's own adapter; None if it could not
            be made.
        metrics: The metric of each task, in order.
        behind: How far its score is below the best one, and the standard error of that over the rows.
        problem: Why it could not be made.
    """

    name: str
    method: str | None
    floor: Floor | None
    score: float | None
    metrics: tuple[float, ...] = ()
    behind: tuple[float, float] | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """What `auto` found.

    Attributes:
        adapter: The merge by what was judged best; its record names method, weights and parameters, and regenerates it.
        best: Its row: the first of the portfolio that is no more than two standard errors behind the best, or a
            single adapter where that is the best.
        table: Everything that was tried, best first.
        tasks: The adapters whose tasks were judged on, in the order of `Judged.metrics`, with the metric of each.
    """

    adapter: Adapter
    best: Judged
    table: tuple[Judged, ...]
    tasks: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a merge is made: what a record of it tells."""

    method: str
    weights: tuple[float, ...] | None
    parameters: MergeParameters


def auto_merge(
    adapters: Mapping[str, Adapter],
    parameters: AutoParameters | None = None,
    *,
    rows: int = ROWS,
    seed: int = 0,
    parents: Sequence[Parent] = (),
    notes: Mapping[str, Json] | None = None,
    portfolio: Sequence[Candidate] = PORTFOLIO,
    batch_size: int = 32,
) -> Chosen:
    """Try a portfolio of merges and keep one that a few rows of every adapter's own task cannot tell from the best.

    Each task is read with its own head. What is judged by is the likelihood, the mean of exp(−loss) over the rows: of
    so few rows an accuracy tells too little. It is divided by that of the task's own adapter, and the mean over
    tasks is taken. The floors are the bare base, the best single adapter for all tasks, and task arithmetic. Rows are
    of the training split, and such as the adapter was not trained on if there are enough.

    Args:
        adapters: By name, of linear methods and one base; their records name their tasks.
        parameters: The rank of the result.
        rows: So many of each task.
        seed: Which rows, and what methods draw.
        parents: Where the adapters came from, as in `merge`.
        notes: What else the lineage should tell.
        portfolio: What to try.
        batch_size: Rows a batch.

    Raises:
        ConfigError: If a record names no task.
        MergeError: If nothing is better than the bare base, or nothing could be merged.
    """
    chosen = parameters or AutoParameters()
    bench = Bench(trials_of(adapters, rows, seed=seed), batch_size=batch_size)
    parts = list(adapters.values())
    own = [bench.judge_on(trial.adapter, number) for number, trial in enumerate(bench.trials)]
    maker = _Maker(bench, parts, seed, rows)
    recipes = {candidate.name: _recipe(candidate, len(parts), chosen.rank, seed) for candidate in portfolio}
    tried = [maker.tried(candidate, recipes[candidate.name]) for candidate in portfolio]
    for number, name in enumerate(adapters):
        only = tuple(float(other == number) for other in range(len(parts)))
        recipes[name] = _Recipe("linear", only, METHODS["linear"].params())
        tried.append(Tried(name, "linear", "single", bench.judge(parts[number])))
    tried.append(Tried("nothing (the bare base)", None, "nothing", bench.judge(None)))
    table = judged(tried, own)
    ranked = sorted(table, key=lambda row: (row.score is None, -(row.score or 0.0)))
    if ranked[0].method is None:
        raise MergeError(
            f"auto: nothing is better than the bare base, {ranked[0].score:.3f}, on {rows} rows of each task "
            f"(next {ranked[1].name}, {ranked[1].score or 0:.3f}); keep the adapters apart, a route for each row"
        )
    best = ranked[0] if ranked[0].floor == "single" else next(row for row in table if _is_near(row))
    tasks = tuple((trial.name, verdict.metric) for trial, verdict in zip(bench.trials, own, strict=True))
    told: dict[str, Json] = {
        "rows": rows,
        "chosen": best.name,
        "tried": [{"name": row.name, "score": row.score, "behind": row.behind} for row in ranked],
    }
    recipe = recipes[best.name]
    told = encode({"auto": told, "seed": seed, **maker.examples(recipe), **(notes or {})})
    return Chosen(maker.make(recipe, parents, told), best, tuple(ranked), tasks)


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of a candidate; no verdicts if it could not be made."""

    name: str
    method: str | None
    floor: Floor | None
    verdicts: tuple[Verdict, ...] = ()
    problem: str | None = None


def judged(tried: Sequence[Tried], own: Sequence[Verdict]) -> list[Judged]:
    """Scores, and how far each is behind the best."""
    shares = {one.name: _shares(one.verdicts, own) for one in tried if one.verdicts}
    best = max(shares.values(), key=_mean)
    rows = []
    for one in tried:
        if not one.verdicts:
            rows.append(Judged(one.name, one.method, one.floor, None, problem=one.problem))
            continue
        values = tuple(verdict.value for verdict in one.verdicts)
        found = shares[one.name]
        rows.append(Judged(one.name, one.method, one.floor, _mean(found), values, _behind(best, found)))
    return rows


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


def _is_near(row: Judged) -> bool:
    return row.behind is not None and row.behind[0] <= ERRORS * row.behind[1]


class _Maker:
    """Makes merges of the same adapters; what some of them look at is recorded once."""

    def __init__(self, bench: Bench, parts: Sequence[Adapter], seed: int, rows: int) -> None:
        self._bench = bench
        self._parts = parts
        self._seed = seed
        self._rows = rows
        self._inputs: dict[bool, Sequence[Mapping[str, Tensor]]] = {}
        self._base = bench.loaded(bench.trials[0].task.kind).model if needs_base(parts) else None

    def examples(self, recipe: _Recipe) -> dict[str, int]:
        """How many examples of each task a method looks at, where it is another number than elsewhere: a gradient of
        each costs a pass back through the model."""
        return {"per_domain": self._rows} if recipe.parameters.gradients else {}

    def make(self, recipe: _Recipe, parents: Sequence[Parent] = (), notes: Mapping[str, Json] | None = None) -> Adapter:
        return merge(
            self._parts,
            recipe.method,
            weights=recipe.weights,
            parameters=recipe.parameters,
            inputs=self._looked_at(recipe) if recipe.parameters.reads == "own tasks" else (),
            base=self._base,
            parents=parents,
            notes=notes,
        )

    def _looked_at(self, recipe: _Recipe) -> Sequence[Mapping[str, Tensor]]:
        """What the adapters read of their own tasks, as a merge from the record would have it."""
        gradients = recipe.parameters.gradients
        if gradients not in self._inputs:
            limit = self.examples(recipe).get("per_domain", SelectSettings().per_domain)
            self._inputs[gradients] = record_examples(
                self._parts, None, limit=limit, seed=self._seed, gradients=gradients
            )
        return self._inputs[gradients]

    def tried(self, candidate: Candidate, recipe: _Recipe) -> Tried:
        try:
            merged = self.make(recipe)
        except MergeError as error:
            return Tried(candidate.name, candidate.method, candidate.floor, problem=str(error))
        return Tried(candidate.name, candidate.method, candidate.floor, self._bench.judge(merged))


def _recipe(candidate: Candidate, count: int, rank: int | None, seed: int) -> _Recipe:
    kind = METHODS[candidate.method].params
    names = {each.name for each in fields(kind)}
    given = {"rank": rank, "seed": seed}
    parameters = kind(**{name: value for name, value in given.items() if name in names}, **candidate.values)
    weights = None if candidate.weight is None else (candidate.weight,) * count
    return _Recipe(candidate.method, weights, parameters)
