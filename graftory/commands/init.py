"""`hub init`."""

from __future__ import annotations

import click

from graftory.commands.output import json_option, print_json


@click.command("init")
@click.argument("folder", metavar="[DIR]", default=".", type=click.Path(file_okay=False))
@json_option
def command(folder: str, as_json: bool) -> None:
    """Create a hub: an empty folder for adapters.

    The folder gets a registry.json (the index) and .hub/ (the adapters). A hub that is there already
    stays as it is.

    \b
    Example:
      hub init my-adapters
    """
    from graftory.hub import Hub

    hub = Hub.create(folder)
    if as_json:
        print_json({"root": str(hub.root)})
    else:
        click.echo(f"hub ready in {hub.root}")
