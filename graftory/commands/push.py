"""`hub push`."""

from __future__ import annotations

import click

from graftory.commands.output import json_option, print_ref, progress_bar


@click.command("push")
@click.argument("ref")
@click.argument("remote")
@json_option
@click.pass_obj
def command(registry: str | None, ref: str, remote: str, as_json: bool) -> None:
    """Send an adapter to a remote hub.

    A remote is a folder, written file:///folder; it becomes a hub if it is not one yet. A version
    that the remote has with the same content is left alone, with other content refused.

    \b
    Example:
      hub push trec@1 file:///srv/adapters
    """
    from graftory.hub import Hub

    hub = Hub.open(registry)
    with progress_bar("pushing") as progress:
        pushed = hub.push(ref, remote, progress=progress)
    print_ref(f"pushed to {remote}:", hub, pushed, as_json)
