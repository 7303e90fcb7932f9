"""`hub list`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from graftory.commands.output import json_option, print_json, print_table

if TYPE_CHECKING:
    from graftory.hub import Hub


@click.command("list")
@click.argument("remote", required=False)
@json_option
@click.pass_obj
def command(registry: str | None, remote: str | None, as_json: bool) -> None:
    """List the adapters of the hub.

    With REMOTE, an address or the name of one, list the names and versions that are there.

    \b
    Example:
      hub list
      hub list --json
      hub list s3://bucket/adapters
    """
    from graftory.hub import Hub

    hub = Hub.open(registry)
    if remote is not None:
        list_remote(hub, remote, as_json)
        return
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


def list_remote(hub: Hub, remote: str, as_json: bool) -> None:
    """Names and versions of a remote."""
    names = hub.listing(remote)
    if as_json:
        print_json(names)
    elif not names:
        click.echo(f"no adapters in {remote}; send one with hub push")
    else:
        print_table(
            ("name", "versions"),
            [(name, ", ".join(map(str, versions))) for name, versions in sorted(names.items())],
        )


def aliases_text(aliases: Mapping[str, int]) -> str:
    """`prod=3 test=4`."""
    return " ".join(f"{alias}={version}" for alias, version in sorted(aliases.items()))
