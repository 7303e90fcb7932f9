"""`hub show`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from graftory.adapter import Metric
from graftory.commands.output import json_option, print_json, print_table
from graftory.config import config_to_json

if TYPE_CHECKING:
    from graftory.hub import Record


@click.command("show")
@click.argument("ref")
@json_option
@click.pass_obj
def command(registry: str | None, ref: str, as_json: bool) -> None:
    """Show everything that is recorded about an adapter.

    \b
    Example:
      hub show trec
      hub show trec@1 --json
    """
    from graftory.hub import Hub
    from graftory.hub.records import record_to_json

    record = Hub.open(registry).record(ref)
    if as_json:
        print_json(record_to_json(record))
        return
    for name, value in facts(record):
        click.echo(f"{click.style(name.ljust(10), bold=True)}  {value}")
    if record.spec.metrics:
        click.echo()
        print_metrics(record.spec.metrics)


def facts(record: Record) -> list[tuple[str, str]]:
    """What people ask about an adapter, as name and text."""
    spec = record.spec
    config = {key: value for key, value in config_to_json(spec.config).items() if value not in (None, {}, [])}
    targets = config.pop("targets", [])
    method = config.pop("method")
    rows = [
        ("adapter", str(record.ref)),
        ("digest", record.digest),
        ("created", record.created),
        ("base", " ".join(part for part in (spec.base.id, spec.base.revision, spec.base.weights_hash) if part)),
        ("method", f"{method}  {_pairs(config)}"),
        ("targets", f"{len(targets)} modules: {', '.join(targets[:2])}{', ...' if len(targets) > 2 else ''}"),
    ]
    if spec.task:
        labels = f"  labels {', '.join(spec.task.labels)}" if spec.task.labels else ""
        rows.append(("task", f"{spec.task.name} ({spec.task.kind}){labels}"))
    rows.append(("made by", f"{spec.lineage.process}  {_pairs(spec.lineage.parameters)}"))
    rows += [("parent", f"{parent.ref} ({parent.relation})") for parent in spec.lineage.parents]
    numbers = sum(math.prod(tensor.shape) for tensor in record.tensors)
    rows.append(("tensors", f"{len(record.tensors)} with {numbers:,} numbers"))
    rows += [("file", f"{file.path}  {file.size:,} bytes  sha256:{file.sha256[:12]}...") for file in record.files]
    return rows


def print_metrics(metrics: tuple[Metric, ...]) -> None:
    """A table of measured numbers."""
    print_table(
        ("metric", "value", "data", "split", "rows"),
        [(row.name, f"{row.value:.4f}", row.data, row.split, str(row.n)) for row in metrics],
    )


def _pairs(values: object) -> str:
    items = values.items() if isinstance(values, dict) else ()
    return ", ".join(f"{key}={_brief(value)}" for key, value in items if value is not None)


def _brief(value: object) -> object:
    """A list of objects by how many they are; `--json` has them all."""
    return len(value) if isinstance(value, list) and any(isinstance(item, dict) for item in value) else value
