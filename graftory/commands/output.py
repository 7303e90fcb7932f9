"""How commands print: columns of plain text, JSON, progress. Nothing heavy is imported here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import click

from graftory.adapter import AdapterRef
from graftory.printable import printable
from graftory.progress import Progress
from graftory.schema import Json, encode

if TYPE_CHECKING:
    from graftory.hub import Delivery, Hub

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


def print_json(value: Json) -> None:
    """Print a value, dataclasses included, as indented JSON."""
    click.echo(json.dumps(encode(value), indent=2, ensure_ascii=False))


def print_ref(verb: str, hub: Hub, ref: AdapterRef, as_json: bool) -> None:
    """Say what happened to which version."""
    record = hub.record(ref)
    if as_json:
        print_json(ref_to_json(hub, ref))
    else:
        click.echo(f"{verb} {record.ref}  {record.digest[:19]}")


def ref_to_json(hub: Hub, ref: AdapterRef) -> dict[str, Json]:
    """Which version it is, for scripts."""
    record = hub.record(ref)
    return {"ref": str(ref), "name": record.name, "version": record.version, "digest": record.digest}


def print_delivery(verb: str, delivery: Delivery, as_json: bool) -> None:
    """Say what travelled, and which aliases were left alone."""
    if as_json:
        print_json(
            {
                "ref": str(delivery.ref),
                "name": delivery.ref.name,
                "version": delivery.ref.version,
                "digest": delivery.digest,
                "parents": [str(parent) for parent in delivery.parents],
                "aliases": delivery.aliases,
                "kept_aliases": delivery.kept,
                "signatures": delivery.signatures,
                "source": delivery.source,
            }
        )
        return
    parents = f", with {', '.join(map(str, delivery.parents))}" if delivery.parents else ""
    source = f" from {delivery.source}" if delivery.source else ""
    click.echo(f"{verb} {delivery.ref}  {delivery.digest[:19]}{parents}{source}")
    for alias in delivery.aliases:
        click.echo(f"{delivery.ref.name}:{alias} means {delivery.ref} there as well")
    for alias, version in delivery.kept.items():
        other = f"{delivery.ref.name}@{version}"
        click.echo(f"{delivery.ref.name}:{alias} means {other} there and stays; --move-aliases moves it")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns under a bold head; the same text in a terminal, a pipe or a file."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for position, row in enumerate((columns, *rows)):
        line = "  ".join(printable(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        click.secho(line, bold=position == 0)


@contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """A progress bar on the standard error, gone when the work is done; silent where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(description, total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{description} {what}", completed=done, total=total)

        yield report


@contextmanager
def working(description: str) -> Iterator[None]:
    """Say what is going on, with a spinner, while something of unknown length is done; silent without a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(description) if console.is_terminal else nullcontext():
        yield
