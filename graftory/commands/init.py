"""`hub init`."""

from __future__ import annotations

import click

from graftory.commands.output import json_option, print_json


@click.command("init")
@click.argument("folder", metavar="[DIR]", required=False, type=click.Path(file_okay=False))
@json_option
@click.pass_obj
def command(registry: str | None, folder: str | None, as_json: bool) -> None:
    """Create a hub: an empty folder for adapters.

    The folder gets a registry.json (the index) and .hub/ (the adapters). A hub that is there already
    stays as it is. Without DIR it is made where --registry points, else right here.

    \b
    Example:
      hub init my-adapters
    """
    from graftory.hub import Hub

    hub = Hub.create(folder or registry or ".")
    if as_json:
        print_json({"root": str(hub.root)})
    else:
        click.echo(f"hub ready in {hub.root}")
