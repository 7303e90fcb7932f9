"""`hub remote`."""

from __future__ import annotations

import click

from graftory.commands.output import json_option, print_json, print_table


@click.group("remote")
def command() -> None:
    """Give remotes short names.

    Where a remote is asked for, its name stands for its address: hub push trec@1 origin,
    hub pull origin/trec@1; where the address is one adapter (hf://org/repo), hub pull origin@1.

    \b
    Example:
      hub remote add origin s3://team/adapters
      hub remote list
    """


@command.command("add")
@click.argument("name")
@click.argument("address")
@json_option
@click.pass_obj
def add(registry: str | None, name: str, address: str, as_json: bool) -> None:
    """Give an address a name in this hub.

    The address is kept as it is, and must not hold a password or token: those come from the environment
    or from the configuration of the remote's own client. The remote is not asked.

    \b
    Example:
      hub remote add origin file:///srv/adapters
      hub remote add bucket s3://team/adapters
      hub remote add trec hf://org/trec-adapter
    """
    from graftory.hub import Hub
    from graftory.hub.depot import Depot
    from graftory.hub.named import add_remote

    add_remote(Depot(Hub.open(registry).root), name, address)
    _print({"name": name, "address": address}, f"{name} is {address}", as_json)


@command.command("list")
@json_option
@click.pass_obj
def list_(registry: str | None, as_json: bool) -> None:
    """List the named remotes of this hub. None of them is asked.

    \b
    Example:
      hub remote list
      hub remote list --json
    """
    from graftory.hub import Hub
    from graftory.hub.depot import Depot
    from graftory.hub.named import remotes

    hub = Hub.open(registry)
    known = remotes(Depot(hub.root))
    if as_json:
        print_json(dict(known))
    elif not known:
        click.echo(f"no named remotes yet in {hub.root}; name one: hub remote add NAME ADDRESS")
    else:
        print_table(("name", "address"), list(known.items()))


@command.command("remove")
@click.argument("name")
@json_option
@click.pass_obj
def remove(registry: str | None, name: str, as_json: bool) -> None:
    """Forget the name of a remote. The remote itself stays as it is.

    \b
    Example:
      hub remote remove origin
    """
    from graftory.hub import Hub
    from graftory.hub.depot import Depot
    from graftory.hub.named import remove_remote

    address = remove_remote(Depot(Hub.open(registry).root), name)
    _print({"name": name, "address": address}, f"{name} no longer stands for {address}", as_json)


def _print(facts: dict[str, str], text: str, as_json: bool) -> None:
    if as_json:
        print_json(facts)
    else:
        click.echo(text)
