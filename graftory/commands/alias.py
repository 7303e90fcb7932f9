"""`hub alias`."""

from __future__ import annotations

import click

from graftory.commands.output import json_option, print_json, print_table


@click.command("alias")
@click.argument("ref")
@click.argument("alias", required=False)
@json_option
@click.pass_obj
def command(registry: str | None, ref: str, alias: str | None, as_json: bool) -> None:
    """Name a version, or list the names of versions.

    REF:ALIAS then means that version wherever a reference is asked for, until the alias is moved.

    \b
    Example:
      hub alias trec@3 prod
      hub alias trec
      hub show trec:prod
    """
    from graftory.hub import Hub

    hub = Hub.open(registry)
    found = hub.record(ref)
    if alias is not None:
        hub.set_alias(found.name, alias, found.version)
    aliases = dict(hub.aliases(found.name))
    if as_json:
        print_json(aliases)
    elif alias is not None:
        click.echo(f"{found.name}:{alias} is {found.ref}")
    else:
        print_table(("alias", "version"), [(name, str(version)) for name, version in sorted(aliases.items())])
