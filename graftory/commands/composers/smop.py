"""`hub compose smop`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from graftory.adapter import TASK_SOURCE, Parent, check_name
from graftory.commands.composers.settings import SettingsCommand
from graftory.commands.options import checkpoints_option, flag_of, given_settings, rows_option, seed_option
from graftory.commands.output import json_option, print_json, working
from graftory.commands.show import print_metrics
from graftory.commands.train import rows_of_test
from graftory.config import SmopConfig
from graftory.data import load_rows, load_task
from graftory.errors import ConfigError
from graftory.settings import SmopSettings

_OF_THE_START = ("prompts", "length", "spread")
"""Fields of the configuration that an adapter to start from has already."""


@click.command("smop", cls=SettingsCommand, settings=(SmopConfig, SmopSettings))
@click.argument("task_source", metavar="TASK")
@click.option("--name", required=True, help="Name of the prompts in the hub.")
@click.option("--base", help="The base model. [default: the one recorded of the adapter to start from]")
@click.option("--from", "start", metavar="REF", help="Start from prompts in the hub, trained on another task.")
@rows_option
@seed_option
@checkpoints_option
@json_option
@click.pass_obj
def command(
    registry: str | None,
    task_source: str,
    name: str,
    base: str | None,
    start: str | None,
    rows: int | None,
    seed: int,
    checkpoints: Path | None,
    as_json: bool,
) -> None:
    """Train short prompts and a router that picks one for each row (SMoP).

    The base stays as it is; what learns are the prompts, their router, and a head for TASK. With --prompts 1 it is
    plain prompt tuning. hub compose routing shows which prompt takes what.

    \b
    Example:
      hub compose smop wheel:trec --base wheel:minilm --name prompts --prompts 4 --length 5
      hub compose smop task.yaml --from prompts@1 --name ours --epochs 20
    """
    from graftory.compose.smop import smop
    from graftory.hub import Hub
    from graftory.training import Job, evaluate, load_base

    hub = Hub.open(registry)
    task, name = load_task(task_source), check_name(name)
    record = hub.record(start) if start else None
    given = given_settings(SmopConfig)
    fixed = [flag_of(field) for field in _OF_THE_START if field in given]
    if record is not None and fixed:
        raise ConfigError(f"{fixed[0]}: {record.ref} has its own; leave it out, or start afresh without --from")
    base = base or (record.spec.base.id if record else None)
    if base is None:
        raise ConfigError("no base model; give --base, for instance wheel:minilm")
    settings = SmopSettings(**given_settings(SmopSettings), seed=seed)
    training_rows, test_rows = load_rows(task, "train", limit=rows, seed=seed), rows_of_test(task)
    with working(f"loading {base}"):
        loaded = load_base(base, task.kind)
    adapter = smop(
        loaded,
        task,
        training_rows,
        SmopConfig(**given, init_seed=seed),
        settings,
        name=name,
        init=hub.get(record.ref) if record else None,
        parent=Parent(str(record.ref), record.digest, "continued") if record else None,
        output_dir=checkpoints,
    )
    lineage = adapter.spec.lineage
    lineage = replace(lineage, parameters={**lineage.parameters, TASK_SOURCE: task_source})
    adapter = replace(adapter, spec=replace(adapter.spec, lineage=lineage))
    if test_rows is not None:
        with working(f"measuring on {len(test_rows)} test rows"):
            (metrics,) = evaluate(loaded, [Job(name, adapter, None, task, test_rows)])
        adapter = replace(adapter, spec=replace(adapter.spec, metrics=metrics))
    ref = hub.put(name, adapter)
    if as_json:
        print_json({"ref": str(ref), "digest": hub.record(ref).digest, "metrics": adapter.spec.metrics})
        return
    click.echo(f"trained {ref} on {len(training_rows)} rows{f', from {record.ref}' if record else ''}")
    if adapter.spec.metrics:
        print_metrics(adapter.spec.metrics)
