"""`hub log`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graftory.commands.output import json_option, print_json, print_table
from graftory.printable import printable
from graftory.schema import Json

if TYPE_CHECKING:
    import networkx

    from graftory.adapter import Metric
    from graftory.hub import Hub, Record

_FORMATS = (".png", ".svg")


@click.command("log")
@click.argument("ref")
@click.option("--children", is_flag=True, help="Also what was made from it.")
@click.option("--history", is_flag=True, help="All versions of its name instead, newest first.")
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw the family: FILE.png or FILE.svg.",
)
@json_option
@click.pass_obj
def command(registry: str | None, ref: str, children: bool, history: bool, picture: Path | None, as_json: bool) -> None:
    """Show what an adapter was made from.

    Parents are below the adapter that was made from them, with how they took part in it. One that takes
    part in several ways is shown once and named where it comes again.

    \b
    Example:
      hub log both@1
      hub log both@1 --children --json
      hub log both@1 --picture family.svg
      hub log both --history
    """
    from graftory.hub import Hub

    if history and (children or picture):
        raise click.UsageError("--history lists versions of a name; leave --children and --picture out")
    if picture is not None and picture.suffix not in _FORMATS:
        raise click.BadParameter(f"{picture.name}: wanted {' or '.join(_FORMATS)}", param_hint="--picture")
    hub = Hub.open(registry)
    if history:
        print_history(hub, ref, as_json)
    else:
        print_family(hub, ref, children, picture, as_json)


def print_family(hub: Hub, ref: str, children: bool, picture: Path | None, as_json: bool) -> None:
    """The family as a tree or JSON, and in a picture if one is wanted."""
    record = hub.record(ref)
    family = hub.lineage(record.ref, children=children)
    if picture is not None:
        from graftory.hub.picture import draw_family

        picture.write_bytes(draw_family(family, record.digest, picture.suffix[1:]))
        click.echo(f"picture: {picture}", err=True)
    if as_json:
        print_json(family_json(family, record))
    else:
        click.echo(describe(family, record.digest))
        for line in branches(family, record.digest):
            click.echo(line)
        if children:
            click.echo()
            made = list(branches(family, record.digest, down=True))
            click.echo("made from it" if made else "nothing in this hub was made from it")
            for line in made:
                click.echo(line)


def family_json(family: networkx.DiGraph[str], asked: Record) -> Json:
    """Every adapter once and every part that one has in another once, joined by digests."""
    return {
        "ref": str(asked.ref),
        "digest": asked.digest,
        "nodes": [
            {"ref": node["ref"], "digest": digest, "present": node["known"], **_facts(node.get("record"))}
            for digest, node in family.nodes.items()
        ],
        "edges": [
            {"parent": parent, "child": child, "relation": relation, "weight": weight}
            for parent, child, data in family.edges(data=True)
            for relation, weight in data["links"]
        ],
    }


def _facts(record: Record | None) -> dict[str, Json]:
    """What a script wants to know of an adapter; null for one that is not here."""
    return {
        "process": record.spec.lineage.process if record else None,
        "created": record.created if record else None,
        "method": record.spec.method if record else None,
        "task": record.spec.task.name if record and record.spec.task else None,
        "metric": _metric(record.spec.metrics) if record else None,
    }


def _metric(metrics: tuple[Metric, ...]) -> Json:
    from graftory.hub.picture import main_metric
    from graftory.schema import encode

    return encode(main_metric(metrics))


def describe(family: networkx.DiGraph[str], digest: str) -> str:
    """One adapter in one line."""
    from graftory.hub.picture import metric_text

    node = family.nodes[digest]
    record: Record | None = node.get("record")
    facts = ["not in this hub"]
    if record is not None:
        facts = [printable(record.spec.lineage.process), printable(record.created), metric_text(record.spec.metrics)]
    return "  ".join([printable(node["ref"]), digest[:19], *filter(None, facts)])


def branches(family: networkx.DiGraph[str], top: str, *, down: bool = False) -> Iterator[str]:
    """The lines below an adapter, as a tree; an adapter that comes again is not followed again.

    Args:
        family: The graph.
        top: A digest.
        down: Whether to follow children, and not parents.
    """
    near = family.successors if down else family.predecessors
    shown = {top}
    stack = [(top, "", list(near(top)))]
    while stack:
        digest, indent, rest = stack[-1]
        if not rest:
            stack.pop()
            continue
        other = rest.pop(0)
        link = family.edges[(digest, other) if down else (other, digest)]
        again = other in shown
        yield f"{indent}{'├─ ' if rest else '└─ '}{_branch(family, other, link, again)}"
        if not again:
            shown.add(other)
            stack.append((other, indent + ("│  " if rest else "   "), list(near(other))))


def _branch(family: networkx.DiGraph[str], digest: str, link: Mapping[str, Any], again: bool) -> str:
    from graftory.hub.picture import link_text

    text = f"{printable(family.nodes[digest]['ref'])}  see above" if again else describe(family, digest)
    return f"{text}  ({link_text(link['links'])})"


def print_history(hub: Hub, ref: str, as_json: bool) -> None:
    """All versions of a name, newest first."""
    from graftory.hub.picture import metric_text

    name = hub.resolve(ref).name
    records = [hub.record(f"{name}@{version}") for version in reversed(hub.versions(name))]
    aliases: dict[int, list[str]] = {}
    for alias, version in hub.aliases(name).items():
        aliases.setdefault(version, []).append(alias)
    if as_json:
        print_json(
            [
                {
                    "ref": str(record.ref),
                    "version": record.version,
                    "digest": record.digest,
                    **_facts(record),
                    "aliases": aliases.get(record.version, []),
                }
                for record in records
            ]
        )
        return
    print_table(
        ("version", "created", "made by", "method", "metric", "aliases", "digest"),
        [
            (
                str(record.ref),
                printable(record.created),
                printable(record.spec.lineage.process),
                record.spec.method,
                metric_text(record.spec.metrics) or "-",
                " ".join(aliases.get(record.version, [])) or "-",
                record.digest[:19],
            )
            for record in records
        ],
    )
