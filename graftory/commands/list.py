"""`hub list`."""

from __future__ import annotations

from collections.abc import Mapping

import click

from graftory.commands.output import json_option, print_json, print_table


@click.command("list")
@json_option
@click.pass_obj
def command(registry: str | None, as_json: bool) -> None:
    """List the adapters of the hub.

    \b
    Example:
      hub list
      hub list --json
    """
    from graftory.hub import Hub

    hub = Hub.open(registry)
    rows = hub.index()
    if as_json:
        print_json(list(rows))
    elif not rows:
        click.echo(f"no adapters yet in {hub.root}; train one (hub train) or add one (hub add)")
    else:
        print_table(
            ("name", "version", "task", "method", "base", "aliases"),
            [
                (row.name, str(row.version), row.task or "-", row.method, row.base, aliases_text(row.aliases))
                for row in rows
            ],
        )


def aliases_text(aliases: Mapping[str, int]) -> str:
    """`prod=3 test=4`."""
    return " ".join(f"{alias}={version}" for alias, version in sorted(aliases.items()))
