"""`--tune` and `--method auto` of `hub merge`: weights, or the method itself, found on rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from graftory.adapter import TASK_SOURCE, Adapter, Parent
from graftory.commands.output import progress_bar, working
from graftory.errors import ConfigError
from graftory.printable import printable
from graftory.schema import Json

if TYPE_CHECKING:
    from graftory.compose.merge.tuning import Chosen
    from graftory.compose.merge.weighting import Weights

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Found:
    """Weights, and what the lineage tells of them."""

    weights: Weights | None
    notes: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tuner:
    """What was asked for.

    Attributes:
        method: The merge method.
        source: The task or file of `--tune`.
        rows: How many rows; None for the method's own number.
        seed: Which.
    """

    method: str
    source: str | None
    rows: int | None
    seed: int

    def check(self, weights: Weights | None, selector: str | None) -> None:
        """Refuse options that do not go together.

        Raises:
            ConfigError: If some do not, or one is missing.
        """
        if self.source is not None and self.method not in TUNERS:
            raise ConfigError(f"--tune goes with --method {' or '.join(TUNERS)}, not with {self.method}")
        if self.rows is not None and self.method not in (*TUNERS, AUTO):
            raise ConfigError(f"--tune-rows goes with --method {', '.join(TUNERS)} or {AUTO}, not with {self.method}")
        if weights is not None and (self.method == AUTO or self.source is not None):
            what = "--method auto" if self.method == AUTO else "--tune"
            raise ConfigError(f"--weights and {what} do not go together: it finds the weights")
        if self.method == AUTO and selector == "greedy":
            raise ConfigError("--select greedy and --method auto do not go together: greedy tries by one method")
        if self.method == "lorahub" and self.source is None and weights is None:
            raise ConfigError("--method lorahub needs --tune TASK, whose rows tell the weights, or --weights")

    def tune(self, adapters: Sequence[Adapter], parameters: Any, weights: Weights | None) -> Found:
        """The weights to merge with: those given, else those that tuning finds, else the method's own."""
        tuner = TUNERS.get(self.method)
        if tuner is None or weights is not None:
            return Found(weights)
        return tuner(self, adapters, parameters)

    def choose(
        self, adapters: Mapping[str, Adapter], rank: int | None, parents: Sequence[Parent], notes: Json
    ) -> Chosen:
        """What `auto` finds best."""
        from graftory.compose.merge.tuning import AutoParameters, auto_merge
        from graftory.compose.merge.tuning.auto import ROWS

        with progress_bar("trying ways to merge") as progress:
            return auto_merge(
                adapters,
                AutoParameters(rank=rank),
                rows=self.rows or ROWS,
                seed=self.seed,
                parents=parents,
                notes=notes,
                progress=progress,
            )


def _lorahub(tuner: Tuner, adapters: Sequence[Adapter], parameters: Any) -> Found:
    from graftory.compose.merge.tuning import tune_weights
    from graftory.data import load_rows, load_task
    from graftory.training import load_base

    task = load_task(str(tuner.source))
    rows = load_rows(task, "train", limit=tuner.rows or 16, seed=tuner.seed)
    base = adapters[0].spec.base.id
    with working(f"loading {base}"):
        loaded = load_base(base, task.kind)
    with working(f"trying {parameters.tries} weights on {len(rows)} rows"):
        found = tune_weights(loaded, adapters, task, rows, parameters)
    told = {"loss": found.loss, "base_loss": found.base_loss, "tries": found.tries}
    return Found(found.weights, _told(tuner, len(rows), told))


def _adamerging(tuner: Tuner, adapters: Sequence[Adapter], parameters: Any) -> Found:
    from graftory.compose.merge.tuning import tune_layers
    from graftory.compose.select import example_texts
    from graftory.training import load_base

    limit = tuner.rows or 128
    sources = [tuner.source or _own_task(adapter, number) for number, adapter in enumerate(adapters)]
    texts = {source: example_texts(source, limit, seed=tuner.seed) for source in sources}
    base = adapters[0].spec.base.id
    with working(f"loading {base}"):
        loaded = load_base(base, "classification")
    with working(f"{parameters.steps} steps on unlabelled inputs of {len(adapters)} tasks"):
        found = tune_layers(loaded, adapters, [texts[source] for source in sources], parameters, seed=tuner.seed)
    told = {"entropy_before": found.before, "entropy_after": found.after}
    return Found(found.weights, _told(tuner, limit, told))


TUNERS: Mapping[str, Callable[[Tuner, Sequence[Adapter], Any], Found]] = {
    "lorahub": _lorahub,
    "adamerging": _adamerging,
}
"""The methods whose weights are found on rows."""


def _told(tuner: Tuner, rows: int, found: Mapping[str, Json]) -> dict[str, Json]:
    on = {} if tuner.source is None else {"on": tuner.source}
    return {"tuned": {**on, "rows": rows, "seed": tuner.seed, **found}}


def _own_task(adapter: Adapter, number: int) -> str:
    source = adapter.spec.lineage.parameters.get(TASK_SOURCE)
    if not isinstance(source, str):
        raise ConfigError(f"adapter {number + 1}: its record names no task to take inputs of; give --tune FILE or TASK")
    return source


def chosen_to_json(found: Chosen) -> Json:
    """What auto tried, for scripts."""
    return {
        "chosen": found.best.name,
        "tasks": [list(task) for task in found.tasks],
        "tried": found.table,
        "first": found.first.name,
        "alone": found.beside,
    }


def print_chosen(found: Chosen) -> None:
    """What auto tried, those that were left first, for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "floor", "rows", "score", *(f"{printable(name)}, {metric}" for name, metric in found.tasks))
    for row in found.table:
        style = "bold" if row is found.best else None
        name = f"{'→ ' if row is found.best else ''}{printable(row.name)}"
        if row.score is None:
            table.add_row(name, row.floor or "", "", "-", *("-" for _ in found.tasks), style="dim")
        else:
            cells = (str(row.rows), f"{row.score:.3f}", *(f"{value:.3f}" for value in row.metrics))
            table.add_row(name, row.floor or "", *cells, style=style)
    Console(highlight=False, markup=False).print(table)
    for row in found.table:
        if row.problem is not None:
            click.echo(f"{row.name} was not tried: {printable(row.problem)}")
    for line in _reasons(found):
        click.echo(line)


def _reasons(found: Chosen) -> Iterator[str]:
    """Why it is kept."""
    first = printable(found.first.name)
    left = sum(row.near for row in found.table)
    why = "the best" if left == 1 else f"of {left} that {found.first.rows} rows of each task cannot tell apart"
    yield f"{first} {'is kept' if found.best is found.first else 'came first'}, {why}"
    for each in found.beside[:1]:
        points, error = (100 * value for value in each.ahead)
        gets = f"gets {abs(points):.1f} ± {error:.1f} points {'more' if points > 0 else 'less'} right"
        told = f"{printable(each.name)} {gets} on {each.rows} rows of each task"
        yield f"{told}: it is kept" if found.best is not found.first else told
