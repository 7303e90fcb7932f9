"""Which method to merge by: a portfolio judged on rows of every task, against what costs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from graftory.adapter import Adapter, Parent
from graftory.compose.merge import METHODS, needs_base
from graftory.compose.merge.judging import Bench, trials_of
from graftory.compose.merge.tuning.parameters import AutoParameters
from graftory.compose.merge.tuning.portfolio import PORTFOLIO, Candidate, Maker, Recipe, recipe_of
from graftory.compose.merge.tuning.race import FIRST, Entrant, Judged, race
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
            adapter where that is the best.
        table: Everything that was tried, what was judged on the most rows first, then by score.
        tasks: The adapters whose tasks were judged on, in the order of `Judged.metrics`, with the metric of each.
    """

    adapter: Adapter
    best: Judged
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
    of those within two of the best the first of the portfolio is kept. The floors are the bare base, the best single
    adapter for all tasks, and task arithmetic. Rows are of the training split, and such as the adapter was not trained
    on if there are enough. All merges are in memory at once.

    Args:
        adapters: By name, of linear methods and one base; their records name their tasks.
        parameters: The rank of the result.
        rows: At most so many of each task.
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
    trials = [replace(trial, rows=trial.rows.shuffled(seed)) for trial in trials_of(adapters, rows, seed=seed)]
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
    table = race(bench, entrants, progress)
    ranked = sorted(table, key=lambda row: (-row.rows, -(row.score or 0.0)))
    best = _choice(table, ranked)
    told: dict[str, Json] = {
        "rows": rows,
        "chosen": best.name,
        "tried": [{"name": row.name, "score": row.score, "behind": row.behind, "rows": row.rows} for row in ranked],
    }
    recipe = recipes[best.name]
    told = encode({"auto": told, "seed": seed, **maker.examples(recipe), **(notes or {})})
    tasks = tuple((trial.name, trial.metric) for trial in trials)
    return Chosen(maker.make(recipe, parents, told), best, tuple(ranked), tasks)


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
