"""`hub log`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from graftory.commands.output import json_option, print_json

if TYPE_CHECKING:
    import networkx

    from graftory.hub import Record


@dataclass(frozen=True, slots=True)
class Ancestor:
    """An adapter in a lineage, with what it was made from."""

    ref: str
    digest: str
    relation: str | None
    """What it is to the adapter above it; None at the top."""
    weight: float | None
    present: bool
    """Whether it is in this hub; if not, what it was made from is unknown here."""
    process: str | None
    created: str | None
    parents: tuple[Ancestor, ...]


@click.command("log")
@click.argument("ref")
@json_option
@click.pass_obj
def command(registry: str | None, ref: str, as_json: bool) -> None:
    """Show what an adapter was made from.

    Parents are below the adapter that was made from them, with how they took part in it.

    \b
    Example:
      hub log both@1
      hub log both@1 --json
    """
    from graftory.hub import Hub

    hub = Hub.open(registry)
    top = ancestor(hub.lineage(ref), hub.record(ref).digest, {})
    if as_json:
        print_json(top)
    else:
        click.echo(describe(top))
        for line in branches(top):
            click.echo(line)


def ancestor(family: networkx.DiGraph[str], digest: str, link: Mapping[str, Any]) -> Ancestor:
    """An adapter of a family and, recursively, its parents; one that is not in the hub ends its branch."""
    node = family.nodes[digest]
    record: Record | None = node.get("record")
    return Ancestor(
        ref=node["ref"],
        digest=digest,
        relation=link.get("relation"),
        weight=link.get("weight"),
        present=record is not None,
        process=record.spec.lineage.process if record else None,
        created=record.created if record else None,
        parents=tuple(ancestor(family, parent, family.edges[parent, digest]) for parent in family.predecessors(digest)),
    )


def describe(item: Ancestor) -> str:
    """One adapter in one line."""
    weight = f", weight {item.weight:g}" if item.weight is not None else ""
    link = f"  ({item.relation}{weight})" if item.relation else ""
    facts = f"{item.process}  {item.created}" if item.present else "not in this hub"
    return f"{item.ref}  {item.digest[:19]}  {facts}{link}"


def branches(item: Ancestor, indent: str = "") -> Iterator[str]:
    """The lines below an adapter, as a tree."""
    for position, parent in enumerate(item.parents, 1):
        last = position == len(item.parents)
        yield f"{indent}{'└─ ' if last else '├─ '}{describe(parent)}"
        yield from branches(parent, indent + ("   " if last else "│  "))
