"""`hub compose hyperformer`, and what the commands of all generators do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graftory.adapter import Parent, check_name
from graftory.commands.composers.settings import SettingsCommand
from graftory.commands.options import checkpoints_option, flag_of, given_settings, rows_option, seed_option
from graftory.commands.output import json_option, print_json, working
from graftory.commands.show import print_metrics
from graftory.commands.train import rows_of_test
from graftory.config import HyperformerConfig
from graftory.data import load_rows, load_task
from graftory.errors import ConfigError
from graftory.settings import HyperformerSettings

if TYPE_CHECKING:
    from graftory.hub import Record


_OPTIONS: Sequence[Callable[[Any], Any]] = (
    click.argument("task_sources", metavar="TASK...", nargs=-1, required=True),
    click.option("--name", required=True, help="Name of the generator in the hub."),
    click.option("--base", help="The base model. [default: the one recorded of the generator to start from]"),
    click.option("--from", "start", metavar="REF", help="Teach this one more task: only its embedding and head learn."),
    click.option(
        "--target",
        "targets",
        multiple=True,
        help="End of a module path: generate only there; may be repeated. [default: after attention and FFN; lora: "
        "q, v]",
    ),
    *(rows_option, seed_option, checkpoints_option, json_option),
)


def generator_command(kind: type[HyperformerConfig], help_text: str) -> click.Command:
    """The command that trains generators of a kind, with the options of its configuration."""
    run: Any = click.pass_obj(partial(train_generator, kind=kind))
    for option in reversed(_OPTIONS):
        run = option(run)
    made: click.Command = click.command(
        kind.method, cls=SettingsCommand, settings=(kind, HyperformerSettings), help=help_text
    )(run)
    return made


def train_generator(
    registry: str | None,
    task_sources: tuple[str, ...],
    name: str,
    base: str | None,
    start: str | None,
    targets: tuple[str, ...],
    rows: int | None,
    seed: int,
    checkpoints: Path | None,
    as_json: bool,
    kind: type[HyperformerConfig],
) -> None:
    """Train a generator, or teach one more task to it, measure its tasks and keep it.

    Raises:
        ConfigError: If there is no base, or what is given does not go with `--from`.
    """
    from graftory.compose.hyperformer import add_task, hyperformer, task_adapter
    from graftory.hub import Hub
    from graftory.training import Job, evaluate, load_base

    hub = Hub.open(registry)
    name = check_name(name)
    tasks = [load_task(source) for source in task_sources]
    record = hub.record(start) if start else None
    check_start(start, record, kind, task_sources, targets)
    base = base or (record.spec.base.id if record else None)
    if base is None:
        raise ConfigError("no base model; pass --base: a hub id, a folder, or wheel:minilm")
    settings = HyperformerSettings(**given_settings(HyperformerSettings), seed=seed)
    data = [(task, load_rows(task, "train", limit=rows, seed=seed)) for task in tasks]
    with working(f"loading {base}"):
        loaded = load_base(base, tasks[0].kind)
    if record is not None:
        parent = Parent(str(record.ref), record.digest, "continued")
        made = add_task(
            loaded,
            hub.get(record.ref),
            *data[0],
            settings=settings,
            name=name,
            source=task_sources[0],
            parent=parent,
            output_dir=checkpoints,
        )
    else:
        config = kind(**given_settings(kind), targets=targets)
        made = hyperformer(loaded, data, config, settings, name=name, sources=task_sources, output_dir=checkpoints)
    tests = [(task, rows_of_test(task)) for task in tasks]
    jobs = [
        Job(task.name, task_adapter(made, task.name), None, task, found) for task, found in tests if found is not None
    ]
    if jobs:
        with working(f"measuring {len(jobs)} tasks"):
            metrics = tuple(metric for found in evaluate(loaded, jobs) for metric in found)
        made = replace(made, spec=replace(made.spec, metrics=(*made.spec.metrics, *metrics)))
    ref = hub.put(name, made)
    notes = {key: value for key, value in made.spec.lineage.parameters.items() if key in ("nearest", "similarities")}
    if as_json:
        print_json({"ref": str(ref), "digest": hub.record(ref).digest, "metrics": made.spec.metrics, **notes})
        return
    from_nearest = f", from the prototype of {notes['nearest']}" if notes else ""
    click.echo(f"trained {ref} on {', '.join(task.name for task in tasks)}{from_nearest}")
    if made.spec.metrics:
        print_metrics(made.spec.metrics)


def check_start(
    start: str | None,
    record: Record | None,
    kind: type[HyperformerConfig],
    tasks: tuple[str, ...],
    targets: tuple[str, ...],
) -> None:
    """Refuse what would change a generator that is there already.

    Raises:
        ConfigError: If it is of another kind, or several tasks, targets or options of the generator are given with
            `--from`.
    """
    if start is None or record is None:
        return
    if type(record.spec.config) is not kind:
        raise ConfigError(
            f"--from {start} is a {record.spec.method}, wanted a {kind.method}; use the command of its kind"
        )
    changed = [*(["--target"] if targets else []), *map(flag_of, given_settings(kind))]
    if changed:
        raise ConfigError(f"--from {start} keeps that generator; leave {changed[0]} out")
    if len(tasks) > 1:
        raise ConfigError(f"--from {start} takes one task more, got {len(tasks)}; add them one after another")


command = generator_command(
    HyperformerConfig,
    """Train one generator of adapters on several tasks (Hyperformer).

    From an embedding of the task, the layer and the place it makes the adapter of each; so tasks share what they have
    in common, and one more needs an embedding and a head alone. --no-shared is the paper's first version, with a
    generator for each place. Each task is measured on its test rows.

    \b
    Example:
      hub compose hyperformer wheel:trec wheel:sms wheel:disaster --base wheel:minilm --name many
      hub compose hyperformer wheel:rotten-tomatoes --from many@1 --name many
      hub eval many --task wheel:trec
    """,
)
