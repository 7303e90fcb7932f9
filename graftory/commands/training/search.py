"""`hub train --search N`: which method, placement, size and learning rate; the best of N trials is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graftory.adapter import Metric
from graftory.commands.options import given_parameters, given_settings
from graftory.commands.output import print_json, print_table, working
from graftory.commands.show import print_metrics
from graftory.data import Rows, TaskFile, load_rows
from graftory.data.catalogue import sample_task
from graftory.errors import ConfigError
from graftory.settings import TrainSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from graftory.config import AdapterConfig
    from graftory.hub import Hub
    from graftory.training.search import Found, Trial
    from graftory.training.search_space import Candidate, SearchSpace

_HELD_OUT = 0.2
"""Share of the training rows that trials are measured on, where the task has no validation rows."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A search as the command line asks for it."""

    trials: int
    methods: tuple[str, ...] | None
    folder: Path | None
    base: str | None
    name: str
    targets: tuple[str, ...]
    rows: int | None
    seed: int


def refuse_with_search(**given: object) -> None:
    """Refuse options that a search cannot have.

    Raises:
        ConfigError: If one was given.
    """
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"--{name} does not go with --search, which starts every trial afresh; leave one out")


def search_and_keep(
    hub: Hub,
    task: TaskFile,
    task_source: str,
    wanted: Wanted,
    method: str,
    methods: Mapping[str, type[AdapterConfig]],
    *,
    as_json: bool,
) -> None:
    """Search, put the best trial's adapter into the hub, and say what was tried."""
    from graftory.commands.train import rows_of_test, with_lineage
    from graftory.training import Job, evaluate, load_base
    from graftory.training.search import check_installed, search

    check_installed()
    if wanted.base is None:
        raise ConfigError("no base model; pass --base: a hub id, a folder, or wheel:minilm")
    space = space_of(wanted, method, methods)
    settings = TrainSettings(**given_settings(TrainSettings), seed=wanted.seed)
    training, held_out = rows_of_search(task, wanted.rows, wanted.seed)
    test = rows_of_test(task)
    with working(f"loading {wanted.base}"):
        loaded = load_base(wanted.base, task.kind)
    folder = wanted.folder or Path(f"{wanted.name.replace('/', '-')}-search")
    progress = _Progress(wanted.trials, task.metric)
    found = search(
        loaded, task, training, held_out, space, settings, trials=wanted.trials, folder=folder, progress=progress
    )
    adapter = with_lineage(found.adapter, task_source, None, found.notes())
    metrics: tuple[Metric, ...] = ()
    if test is not None:
        with working(f"measuring on {len(test)} test rows"):
            (metrics,) = evaluate(loaded, [Job(wanted.name, adapter, None, task, test)])
    ref = hub.put(wanted.name, replace(adapter, spec=replace(adapter.spec, metrics=metrics)))
    if as_json:
        print_json({"ref": str(ref), "digest": hub.record(ref).digest, "metrics": metrics, **found.notes()})
        return
    rows = trial_rows(found)
    print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    click.echo(f"kept trial {found.best} as {ref}; {found.metric} on {found.held_out} held-out rows chose it")
    if metrics:
        print_metrics(metrics)


def space_of(wanted: Wanted, method: str, methods: Mapping[str, type[AdapterConfig]]) -> SearchSpace:
    """What is searched: with --method that method alone, its given options fixed; else those of --search-methods.

    Raises:
        ConfigError: If options of a method are given and no --method.
    """
    from graftory.training.search_space import METHODS, SearchSpace

    fixed = given_parameters(method, methods, TrainSettings)
    named = click.get_current_context().get_parameter_source("method") is click.core.ParameterSource.COMMANDLINE
    if named and wanted.methods is not None:
        raise ConfigError("--method and --search-methods both say what is searched; give one of them")
    if fixed and not named:
        raise ConfigError(f"--{next(iter(fixed)).replace('_', '-')} is of one method; name it with --method too")
    return SearchSpace(
        methods=(method,) if named else wanted.methods or METHODS,
        fixed=fixed,
        targets=wanted.targets,
        learning_rate=given_settings(TrainSettings).get("learning_rate"),
        seed=wanted.seed,
    )


def rows_of_search(task: TaskFile, limit: int | None, seed: int) -> tuple[Rows, Rows]:
    """Training rows, and those that trials are measured on: the task's validation rows, or a part of the training's."""
    from graftory.training.search import hold_out

    rows = load_rows(task, "train", limit=limit, seed=seed)
    if task.data.validation or (task.data.sample and "validation" in sample_task(task.data.sample).splits):
        return rows, load_rows(task, "validation")
    return hold_out(rows, _HELD_OUT, seed)


def trial_rows(found: Found) -> list[dict[str, str]]:
    """A table of the trials, ready to print; the best is marked."""
    return [
        {
            "trial": f"{trial.number}{' *' if trial.number == found.best else ''}",
            "method": trial.method,
            "choices": _choices(trial.options),
            "learning rate": f"{trial.learning_rate:.2g}",
            found.metric: _value(trial),
            "parameters": str(trial.parameters),
        }
        for trial in found.trials
    ]


@dataclass(frozen=True, slots=True)
class _Progress:
    """Says on the standard error what is tried and what came of it."""

    trials: int
    metric: str

    def __call__(self, number: int, what: Candidate | Trial) -> None:
        from graftory.training.search import Trial

        if isinstance(what, Trial):
            click.echo(f"trial {number} of {self.trials}: {self.metric} {_value(what)}", err=True)
            return
        choices = _choices(what.options)
        about = f"{what.config.method}{', ' if choices else ''}{choices}, learning rate {what.learning_rate:.2g}"
        click.echo(f"trial {number} of {self.trials}: {about}", err=True)


def _choices(options: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _value(trial: Trial) -> str:
    return f"– ({trial.reason})" if trial.value is None else f"{trial.value:.4f}"
