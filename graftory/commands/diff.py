"""`hub diff`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from graftory.commands.output import json_option, print_json, print_table, working
from graftory.printable import printable, shortened
from graftory.schema import Json

if TYPE_CHECKING:
    from graftory.hub import Difference
    from graftory.hub.norms import Distance

_SHOWN = 12
"""Rows of a table that are shown without --all."""
_WIDE = 44
"""Most characters of a value in a table without --all."""
_SECTIONS = ("base", "config", "task", "lineage", "metrics", "licence")


@click.command("diff")
@click.argument("left")
@click.argument("right")
@click.option(
    "--all", "everything", is_flag=True, help="Show every row and whole values, not the largest changes alone."
)
@json_option
@click.pass_obj
def command(registry: str | None, left: str, right: str, everything: bool, as_json: bool) -> None:
    """Compare two adapters: what is recorded of them, and their tensors.

    Norms are of float64 numbers; relative is |A-B| / |A|. For two LoRA adapters the updates s B A of each
    module are compared as well: two pairs of factors may look different and do the same.

    \b
    Example:
      hub diff trec@1 trec@2
      hub diff trec:prod trec --all
      hub diff trec@1 sms@1 --json
    """
    from graftory.hub import Hub

    hub = Hub.open(registry)
    with working("comparing"):
        found = hub.diff(left, right)
    if as_json:
        print_json(found)
    elif found.same:
        click.echo(f"{found.left} and {found.right} are the same adapter")
    else:
        print_difference(found, None if everything else _SHOWN)


def print_difference(found: Difference, limit: int | None) -> None:
    """Tables of what differs, each with at most `limit` rows."""
    columns = (found.left, found.right)
    width = _WIDE if limit is not None else None
    fields = sorted(found.fields, key=lambda row: _SECTIONS.index(row.field.partition(".")[0]))
    print_rows(
        ("recorded", *columns), [(printable(row.field), *cells(row.left, row.right, width)) for row in fields], None
    )
    print_rows(
        ("metric", *columns, "difference"),
        [
            (
                printable(f"{row.name} on {row.data} ({row.split})"),
                *map(number, (row.left, row.right)),
                signed(row.difference),
            )
            for row in found.metrics
        ],
        None,
    )
    print_rows(
        ("update s B A", "ranks", "|A|", "|B|", "|A-B|", "relative", "cosine"),
        [
            (printable(row.module) or "all modules", f"{row.left_rank} {row.right_rank}", *numbers(row.change))
            for row in found.updates
        ],
        limit,
    )
    print_rows(
        ("tensor", "|A|", "|B|", "|A-B|", "relative", "cosine"),
        [
            (printable(row.name), *(numbers(row.change) if row.change else shapes(row.left.shape, row.right.shape)))
            for row in found.tensors
        ],
        limit,
    )
    print_names(f"only in {found.left}", found.only_left, limit)
    print_names(f"only in {found.right}", found.only_right, limit)
    click.echo(f"tensors: {len(found.tensors)} changed, {found.unchanged} equal byte for byte")


def print_rows(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], limit: int | None) -> None:
    """A table and an empty line; nothing if there is no row."""
    if rows:
        print_table(columns, rows[:limit])
        print_rest(len(rows), limit)
        click.echo()


def print_names(title: str, names: Sequence[str], limit: int | None) -> None:
    """Names below a title; nothing if there is none."""
    if names:
        click.secho(title, bold=True)
        for name in names[:limit]:
            click.echo(printable(name))
        print_rest(len(names), limit)
        click.echo()


def print_rest(rows: int, limit: int | None) -> None:
    """Say how many rows are left out."""
    if limit is not None and rows > limit:
        click.echo(f"... and {rows - limit} more (--all)")


def numbers(change: Distance) -> tuple[str, ...]:
    """The cells of a distance."""
    return tuple(map(number, (change.left, change.right, change.distance, change.relative, change.cosine)))


def shapes(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[str, ...]:
    """The cells of two tensors that no distance is between."""
    return str(list(left)), str(list(right)), "other shape", "-", "-"


def number(value: float | None) -> str:
    """Four digits that count."""
    return "-" if value is None else f"{value:.4g}"


def signed(value: float | None) -> str:
    """A difference, with its sign."""
    return "-" if value is None else f"{value:+.4g}"


def cells(left: Json, right: Json, width: int | None) -> tuple[str, str]:
    """Two recorded values that differ, short; of long lists what only one of them has."""
    whole = text(left), text(right)
    if whole[0] == whole[1]:  # the same parents by name, with other digests
        whole = str(left), str(right)
    elif width is not None and max(map(len, whole)) > width and isinstance(left, list) and isinstance(right, list):
        return alone(left, right, width), alone(right, left, width)
    if width is None or max(map(len, whole)) <= width:
        return whole
    common = next((number for number, (a, b) in enumerate(zip(*whole, strict=False)) if a != b), 0)
    begin = max(0, common - width // 2)  # so that the difference is seen
    before, after = (shortened(f"…{cell[begin:]}" if begin else cell, width) for cell in whole)
    return before, after


def alone(values: list[Json], others: list[Json], width: int) -> str:
    """How many values there are, and those that the other list lacks."""
    own = ", ".join(item_text(value) for value in values if value not in others)
    same = "in another order" if sorted(map(str, values)) == sorted(map(str, others)) else "none of its own"
    return shortened(f"{len(values)}: {own or same}" if len(values) else "-", width)


def text(value: Json) -> str:
    """A recorded value on one line."""
    if value is None or value in ([], {}):
        return "-"
    return ", ".join(map(item_text, value)) if isinstance(value, list) else item_text(value)


def item_text(value: Json) -> str:
    """One value; a parent by reference, relation and weight."""
    if isinstance(value, dict) and "ref" in value:
        parts = (value["ref"], value.get("relation"), value.get("weight"))
        return printable(" ".join(str(part) for part in parts if part is not None))
    return printable(str(value))
