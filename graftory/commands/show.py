"""`hub show`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from graftory.adapter import Metric
from graftory.commands.output import json_option, print_json, print_table
from graftory.config import config_to_json
from graftory.printable import printable
from graftory.schema import Json, encode

if TYPE_CHECKING:
    from graftory.hub import Record


@click.command("show")
@click.argument("ref")
@json_option
@click.pass_obj
def command(registry: str | None, ref: str, as_json: bool) -> None:
    """Show everything that is recorded about an adapter.

    And the aliases that mean it, the keys that signed it, and what its record does not say.

    \b
    Example:
      hub show trec
      hub show trec@1 --json
    """
    from graftory.hub import Hub

    hub = Hub.open(registry)
    record = hub.record(ref)
    aliases = [alias for alias, version in hub.aliases(record.name).items() if version == record.version]
    signatures = hub.signatures(record.ref)
    if as_json:
        print_json(everything(record, aliases, signatures))
        return
    for name, value in [*facts(record), *standing(record, aliases, signatures)]:
        click.echo(f"{click.style(name.ljust(10), bold=True)}  {printable(value)}")
    if record.spec.metrics:
        click.echo()
        print_metrics(record.spec.metrics)


def everything(record: Record, aliases: Sequence[str], signatures: Sequence[str]) -> Json:
    """The record, with what is known beside it and what it lacks."""
    from graftory.hub.completeness import completeness
    from graftory.hub.records import record_to_json

    fields = record_to_json(record)
    known = completeness(record)
    gaps = {"known": known.known, "wanted": known.wanted, "gaps": encode(known.gaps)}
    return {**fields, "completeness": gaps, "aliases": list(aliases), "signatures": list(signatures)}


def standing(record: Record, aliases: Sequence[str], signatures: Sequence[str]) -> list[tuple[str, str]]:
    """What is said of a version elsewhere, and how much of what is wanted its record says."""
    from graftory.hub.completeness import completeness

    known = completeness(record)
    missing = ", ".join(gap.field for gap in known.gaps)
    how = f"; missing: {missing} (how to fill it: hub verify {record.ref} --complete)" if missing else ""
    rows = [("licence", record.spec.licence or "not recorded")]
    if aliases:
        rows.append(("aliases", ", ".join(f"{record.name}:{alias}" for alias in aliases)))
    rows += [("signed by", f"{key[:16]}  (unchecked; hub verify {record.ref} --key FILE)") for key in signatures]
    rows.append(("record", f"{known.known} of {known.wanted} facts known{how}"))
    return rows


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
    if spec.storage != "full":
        whole = sum(math.prod(tensor.shape) * 4 for tensor in record.tensors)
        rows.append(("storage", f"{spec.storage}: {record.size:,} bytes for {whole:,} in fp32"))
    rows += [("file", f"{file.path}  {file.size:,} bytes  sha256:{file.sha256[:12]}...") for file in record.files]
    return rows


def print_metrics(metrics: tuple[Metric, ...]) -> None:
    """A table of measured numbers."""
    print_table(
        ("metric", "value", "data", "split", "rows"),
        [
            (printable(row.name), f"{row.value:.4f}", printable(row.data), printable(row.split), str(row.n))
            for row in metrics
        ],
    )


def _pairs(values: object) -> str:
    items = values.items() if isinstance(values, dict) else ()
    return ", ".join(f"{key}={_brief(value)}" for key, value in items if value is not None)


def _brief(value: object) -> object:
    """A list of objects, or the targets of a configuration in another, by how many they are; `--json` has them all."""
    if isinstance(value, dict):
        targets = value.get("targets")
        return f"({_pairs({**value, 'targets': len(targets)} if isinstance(targets, list) else value)})"
    return len(value) if isinstance(value, list) and any(isinstance(item, dict) for item in value) else value
