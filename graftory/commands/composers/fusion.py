"""`hub compose fusion`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from graftory.adapter import TASK_SOURCE, Parent, check_name
from graftory.commands.composers.settings import SettingsCommand
from graftory.commands.options import checkpoints_option, given_settings, rows_option, seed_option
from graftory.commands.output import json_option, print_json, working
from graftory.commands.refs import check_distinct
from graftory.commands.show import print_metrics
from graftory.commands.train import rows_of_test
from graftory.config import FusionConfig
from graftory.data import load_rows, load_task
from graftory.settings import FusionSettings


@click.command("fusion", cls=SettingsCommand, settings=(FusionConfig, FusionSettings))
@click.argument("task_source", metavar="TASK")
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option("--name", required=True, help="Name of the fusion in the hub.")
@click.option("--base", help="The base model. [default: the one recorded of the first adapter]")
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="End of a module path: fuse only there; may be repeated. [default: wherever an adapter sits]",
)
@rows_option
@seed_option
@checkpoints_option
@json_option
@click.pass_obj
def command(
    registry: str | None,
    task_source: str,
    refs: tuple[str, ...],
    name: str,
    base: str | None,
    targets: tuple[str, ...],
    rows: int | None,
    seed: int,
    checkpoints: Path | None,
    as_json: bool,
) -> None:
    """Attend over the outputs of several adapters (AdapterFusion).

    The adapters, LoRA and bottlenecks in any mixture, stay as they are; what learns is which of them each
    token listens to, and a head for TASK. They become the parents of the new version and travel with it.
    Without training, hub merge makes one plain adapter of several.

    \b
    Example:
      hub compose fusion wheel:trec trec sms disaster --name fused --rows 200
      hub compose fusion task.yaml snli@1 trec@2 --name both --learning-rate 5e-4 --epochs 10
    """
    from graftory.compose.fusion import fuse
    from graftory.hub import Hub
    from graftory.training import Job, evaluate, load_base

    hub = Hub.open(registry)
    task, name = load_task(task_source), check_name(name)
    records = [hub.record(ref) for ref in refs]
    check_distinct((record.digest, str(record.ref)) for record in records)
    config = FusionConfig(**given_settings(FusionConfig), targets=targets, init_seed=seed)
    settings = FusionSettings(**given_settings(FusionSettings), seed=seed)
    training_rows, test_rows = load_rows(task, "train", limit=rows, seed=seed), rows_of_test(task)
    base = base or records[0].spec.base.id
    with working(f"loading {base}"):
        loaded = load_base(base, task.kind)
    fused = fuse(
        loaded,
        task,
        training_rows,
        [hub.get(record.ref) for record in records],
        config,
        settings,
        name=name,
        parents=[Parent(str(record.ref), record.digest, "composed") for record in records],
        output_dir=checkpoints,
    )
    lineage = fused.spec.lineage
    lineage = replace(lineage, parameters={**lineage.parameters, TASK_SOURCE: task_source})
    fused = replace(fused, spec=replace(fused.spec, lineage=lineage))
    if test_rows is not None:
        with working(f"measuring on {len(test_rows)} test rows"):
            (metrics,) = evaluate(loaded, [Job(name, fused, None, task, test_rows)])
        fused = replace(fused, spec=replace(fused.spec, metrics=metrics))
    ref = hub.put(name, fused)
    if as_json:
        print_json({"ref": str(ref), "digest": hub.record(ref).digest, "metrics": fused.spec.metrics})
        return
    click.echo(f"fused {', '.join(str(record.ref) for record in records)} into {ref} on {len(training_rows)} rows")
    if fused.spec.metrics:
        print_metrics(fused.spec.metrics)
