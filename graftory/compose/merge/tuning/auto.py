"""Which method to merge by: a portfolio judged on rows of every task, against what costs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from graftory.adapter import Adapter, Parent
from graftory.compose.merge import METHODS, needs_base
from graftory.compose.merge.judging import Bench, trials_of
from graftory.compose.merge.tuning.floor import MORE, Beside, beside_alone
from graftory.compose.merge.tuning.parameters import AutoParameters
from graftory.compose.merge.tuning.portfolio import PORTFOLIO, Candidate, Maker, Recipe, recipe_of
from graftory.compose.merge.tuning.race import FIRST, Entrant, Judged, race
from graftory.compose.merge.tuning.seen import Seen
from graftory.errors import MergeError
from graftory.progress import Progress, silent
from graftory.schema import Json, encode

ROWS = 128
"""At most so many rows of each task decide."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What `auto` found.

    Attributes:
        adapter: The merge by what was judged best; its record names method, weights and parameters, and regenerates it.
        best: Its row: the first of the portfolio that is no more than two standard errors behind the best, or a single
            adapter where that is the best or gets more right.
        first: What the race chose, before it was held against each adapter alone; mostly the same row.
        beside: Each adapter alone beside that, those that get most right first; none if no task has labels.
        table: Everything that was tried, what was judged on the most rows first, then by score.
        tasks: The adapters whose tasks were judged on, in the order of `Judged.metrics`, with the metric of each.
    """

    adapter: Adapter
    best: Judged
    first: Judged
    beside: tuple[Beside, ...]
    table: tuple[Judged, ...]
    tasks: tuple[tuple[str, str], ...]


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
    progress: Progress = silent,
) -> Chosen:
    """Try a portfolio of merges and keep one that rows of every adapter's own task cannot tell from the best.

    Each task is read with its own head. What is judged by is the likelihood, the mean over the rows of the right
    label's probability at the temperature that suits them (of other tasks, of exp(−loss)): of so few rows an accuracy
    tells too little. It is divided by that of the task's own adapter, and the mean over tasks is taken. All are judged
    on 16 rows of each task, on twice as many those that are not three standard errors behind, and so on up to `rows`;
    of those within two of the best the first of the portfolio is chosen. It is kept unless an adapter alone gets more
    right on up to 8 times as many rows, see `floor`. The floors are the bare base, the best single adapter for all
    tasks, and task arithmetic. Rows are of the training split, and such as the adapter was not trained on if there are
    enough. All merges are in memory at once.

    Args:
        adapters: By name, of linear methods and one base; their records name their tasks.
        parameters: The rank of the result.
        rows: At most so many of each task choose; at most 8 times as many hold the choice against an adapter alone.
        seed: Which rows, and what methods draw.
        parents: Where the adapters came from, as in `merge`.
        notes: What else the lineage should tell.
        portfolio: What to try.
        batch_size: Rows a batch.
        progress: Called with what goes on.

    Raises:
        ConfigError: If a record names no task.
        MergeError: If nothing is better than the bare base, or nothing could be merged.
    """
    chosen = parameters or AutoParameters()
    drawn = trials_of(adapters, rows * MORE, seed=seed)
    trials = [replace(trial, rows=trial.rows.shuffled(seed)) for trial in drawn]
    bench, parts = Bench(trials, batch_size=batch_size), list(adapters.values())
    base = bench.loaded(trials[0].task.kind).model if needs_base(parts) else None
    maker = Maker(parts, base, seed, min(rows, FIRST))
    recipes = {one.name: recipe_of(one, len(parts), chosen.rank, seed) for one in portfolio}
    entrants = []
    for done, one in enumerate(portfolio):
        progress(f"by {one.name}", done, len(portfolio))
        entrants.append(_entrant(one, maker, recipes[one.name]))
    for number, name in enumerate(adapters):
        only = tuple(float(other == number) for other in range(len(parts)))
        alone = f"{name} alone"  # an adapter may have the name of a method
        recipes[alone] = Recipe("linear", only, METHODS["linear"].params())
        entrants.append(Entrant(alone, "linear", "single", parts[number]))
    entrants.append(Entrant("nothing (the bare base)", None, "nothing", None))
    seen = Seen(bench)
    table = race(seen, entrants, rows, progress)
    ranked = tuple(sorted(table, key=lambda row: (-row.rows, -(row.score or 0.0))))
    first = _choice(table, ranked)
    beside = _beside(seen, entrants, first, rows, progress)
    better = [each.name for each in beside if each.better]
    (best,) = [row for row in table if row.name == (better[0] if better else first.name)]
    recipe = recipes[best.name]
    told = {"auto": _told(rows, best, ranked, first, beside), "seed": seed, **maker.examples(recipe), **(notes or {})}
    tasks = tuple((trial.name, trial.metric) for trial in trials)
    return Chosen(maker.make(recipe, parents, encode(told)), best, first, beside, ranked, tasks)


def _entrant(candidate: Candidate, maker: Maker, recipe: Recipe) -> Entrant:
    try:
        merged, problem = maker.make(recipe), None
    except MergeError as error:
        merged, problem = None, str(error)
    return Entrant(candidate.name, candidate.method, candidate.floor, merged, problem)


def _choice(table: Sequence[Judged], ranked: Sequence[Judged]) -> Judged:
    """The first that cannot be told from the best."""
    first = ranked[0]
    if first.method is None:
        raise MergeError(
            f"auto: nothing is better than the bare base, {first.score:.3f}, on {first.rows} rows of each task "
            f"(next {ranked[1].name}, {ranked[1].score or 0:.3f}); keep the adapters apart, a route for each row"
        )
    if first.floor == "single":
        return first
    return next(row for row in table if row.near)


def _beside(
    seen: Seen, entrants: Sequence[Entrant], first: Judged, rows: int, progress: Progress
) -> tuple[Beside, ...]:
    """The adapters alone beside what the race has chosen."""
    (chosen,) = [one for one in entrants if one.name == first.name]
    singles = [one for one in entrants if one.floor == "single" and one is not chosen]
    return beside_alone(seen, chosen, singles, rows, progress)


def _told(rows: int, best: Judged, ranked: Sequence[Judged], first: Judged, beside: Sequence[Beside]) -> Json:
    """What the record says of the choice."""
    tried = [{"name": row.name, "score": row.score, "behind": row.behind, "rows": row.rows} for row in ranked]
    return encode({"rows": rows, "chosen": best.name, "tried": tried, "first": first.name, "alone": beside})
