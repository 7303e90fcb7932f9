"""`hub verify`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graftory.commands.output import json_option, print_json, print_table, progress_bar
from graftory.errors import CorruptAdapterError

if TYPE_CHECKING:
    from graftory.hub import Hub, Problem, Report


@click.command("verify")
@click.argument("refs", metavar="[REF]...", nargs=-1)
@click.option("--complete", is_flag=True, help="List what the records lack.")
@click.option("--rebuild", is_flag=True, help="First make registry.json anew from the records.")
@click.option(
    "--key",
    "key_paths",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="A public key: every version must be signed by it, or by another one given.",
)
@json_option
@click.pass_context
def command(
    context: click.Context,
    refs: tuple[str, ...],
    complete: bool,
    rebuild: bool,
    key_paths: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Check a hub: every byte of every version, its records, aliases and index.

    With REF only these versions. Everything that is wrong is listed with what to do about it; the exit
    code is 1 then. Leftovers of a crash are not wrong: see hub gc. Others may use the hub meanwhile.

    --rebuild mends the index and nothing else: bytes that are damaged must come from another hub. Without
    --key a signature is only checked for its form and for being of its version.

    \b
    Example:
      hub verify
      hub verify trec@1 --key adapters.pub
      hub verify --rebuild
    """
    from graftory.hub import Hub
    from graftory.hub.keys import load_public_key

    hub = Hub.open(context.obj)
    keys = [load_public_key(path.expanduser()) for path in key_paths]
    refused = rebuilt(hub) if rebuild else ()
    with progress_bar("hashing") as progress:
        report = hub.verify(refs, complete=complete, keys=keys, progress=progress)
    report = replace(report, problems=(*refused, *report.problems))
    if as_json:
        print_json({"ok": report.ok, "report": report})
    else:
        print_report(report)
    context.exit(0 if report.ok else 1)


def rebuilt(hub: Hub) -> tuple[Problem, ...]:
    """Make the index anew; a record or log that does not permit it is a problem like others."""
    from graftory.hub import Problem

    try:
        hub.rebuild_index()
    except CorruptAdapterError as error:
        remedy = "do what is said below of this file, then hub verify --rebuild again"
        return (Problem(None, "registry.json", f"was not made anew: {error}", remedy),)
    return ()


def print_report(report: Report) -> None:
    """What was found, the worst last."""
    if report.gaps is not None:
        rows = [(ref, gap.field, gap.remedy) for ref, found in report.gaps.items() for gap in found]
        if rows:
            print_table(("version", "not recorded", "how to fill it"), rows)
            click.echo()
    for ref, key in (report.signed or {}).items():
        click.echo(f"{ref} is signed by {key[:16]}")
    click.echo(f"checked {report.versions} versions, {report.files} files, {report.size:,} bytes")
    if report.leftovers:
        size = sum(item.size for item in report.leftovers)
        click.echo(f"{len(report.leftovers)} files of {size:,} bytes are left over; hub gc removes them")
    for note in report.notes:
        click.echo(f"note: {note.ref or note.where}: {note.what}")
    if report.ok:
        click.echo("nothing is wrong")
        return
    click.echo()
    problems = [(item.ref or "-", item.where, item.what, item.remedy) for item in report.problems]
    print_table(("version", "file", "what is wrong", "what to do"), problems)
    click.echo(f"{len(report.problems)} problems", err=True)
