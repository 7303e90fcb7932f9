"""`hub pull`."""

from __future__ import annotations

import click

from graftory.commands.output import json_option, print_ref, progress_bar


@click.command("pull")
@click.argument("remote_ref", metavar="REMOTE/REF")
@json_option
@click.pass_obj
def command(registry: str | None, remote_ref: str, as_json: bool) -> None:
    """Fetch an adapter from a remote hub.

    Every byte is hashed before the adapter appears here. Adapters that it is composed of come along.

    \b
    Example:
      hub pull file:///srv/adapters/trec@1
    """
    from graftory.hub import Hub

    hub = Hub.open(registry)
    with progress_bar("pulling") as progress:
        ref = hub.pull(remote_ref, progress=progress)
    print_ref("pulled", hub, ref, as_json)
