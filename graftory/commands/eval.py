"""`hub eval`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from graftory.adapter import Metric
from graftory.commands.output import json_option, print_json, print_table, working
from graftory.commands.recorded import Subject, by_model, runnable, subject
from graftory.data import Rows, load_rows
from graftory.errors import ConfigError

if TYPE_CHECKING:
    from graftory.hub import Hub


@click.command("eval")
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option("--task", "source", help="Task to measure all of them on. [default: each adapter's own]")
@click.option("--split", default="test", show_default=True, help="Rows to measure on: test, train or validation.")
@click.option("--rows", type=click.IntRange(min=1), help="Measure on so many rows, drawn at random. [default: all]")
@click.option("--base", help="The base model. [default: the recorded one]")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Rows a batch.")
@json_option
@click.pass_obj
def command(
    registry: str | None,
    refs: tuple[str, ...],
    source: str | None,
    split: str,
    rows: int | None,
    base: str | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Measure adapters on the test rows of their tasks.

    Adapters of one base model are measured together, in batches whose rows use different adapters.

    \b
    Example:
      hub eval trec --task wheel:trec
      hub eval trec sms disaster@2 --rows 200 --json
    """
    from graftory.hub import Hub

    hub = Hub.open(registry)
    subjects = [subject(hub, ref, source, base) for ref in refs]
    measured: dict[str, Sequence[Metric]] = {}
    for group in by_model(subjects).values():
        measured |= measure(hub, group, split, rows, batch_size)
    results = [(item, metric) for item in subjects for metric in measured[item.ref]]
    if as_json:
        print_json([{"ref": item.ref, "task": item.source, "metric": metric} for item, metric in results])
    else:
        print_table(
            ("adapter", "metric", "value", "data", "split", "rows"),
            [(i.ref, m.name, f"{m.value:.4f}", m.data, m.split, str(m.n)) for i, m in results],
        )


def measure(
    hub: Hub, group: Sequence[Subject], split: str, rows: int | None, batch_size: int
) -> dict[str, Sequence[Metric]]:
    """The metrics of adapters that share a base model, in mixed batches."""
    from graftory.training import Job, evaluate, load_base

    data = {item.source: load_rows(item.task, split, limit=rows) for item in group}
    unique = {item.ref: item for item in group}
    for item in group:
        check_labels(item, data[item.source])
    jobs = [
        Job(ref, runnable(hub.get(ref), item.task.name), None, item.task, data[item.source])
        for ref, item in unique.items()
    ]
    with working(f"loading {group[0].base}"):
        loaded = load_base(group[0].base, group[0].task.kind)
    with working(f"measuring {len(jobs)} adapters on {sum(len(job.rows) for job in jobs)} rows"):
        return dict(zip(unique, evaluate(loaded, jobs, batch_size=batch_size), strict=True))


def check_labels(item: Subject, rows: Rows) -> None:
    """Refuse to hold an adapter against labels that its head does not mean.

    Raises:
        ConfigError: If the labels or their order differ.
    """
    own = item.spec.task.labels if item.spec.task else ()
    if own and rows.labels and own != rows.labels:
        raise ConfigError(
            f"{item.ref} was trained for the labels {', '.join(own)}, task {item.task.name} has "
            f"{', '.join(rows.labels)}; give the task it was trained on, or one with the same labels"
        )
