"""`hub gc`."""

from __future__ import annotations

import click

from graftory.commands.output import json_option, print_json, print_table, working


@click.command("gc")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option(
    "--all", "everything", is_flag=True, help="Also downloads younger than a day, which a pull could go on with."
)
@json_option
@click.pass_obj
def command(registry: str | None, dry_run: bool, everything: bool, as_json: bool) -> None:
    """Remove what no version needs: leftovers of crashes and of broken downloads.

    Versions are never removed, and nothing that a running push or pull needs is touched. If a record
    is damaged nothing is removed, as it is unknown what it needs.

    \b
    Example:
      hub gc --dry-run
      hub gc
    """
    from graftory.hub import Hub

    with working("looking for what no version needs"):
        found = Hub.open(registry).gc(dry_run=dry_run, partial_downloads=everything)
    if as_json:
        print_json({"dry_run": dry_run, "freed": found.freed, "removed": found.removed})
        return
    if found.removed:
        rows = [(item.path, f"{item.size:,}", item.why) for item in found.removed]
        print_table(("file", "bytes", "what it was"), rows)
    verb = "would free" if dry_run else "freed"
    click.echo(f"{verb} {found.freed:,} bytes in {len(found.removed)} files")
