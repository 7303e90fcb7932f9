"""`hub serve-plugin`."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING

import click

from graftory.commands.output import json_option, print_json
from graftory.errors import ConfigError, UnsupportedAdapterError
from graftory.printable import printable

if TYPE_CHECKING:
    from graftory.hub import Hub, Record

GROUP = "vllm.general_plugins"
"""Where vLLM looks for plugins."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""
SHOWN = 5
"""Adapters that cannot be served, by name; more are counted."""
LOADED = 8
"""Different adapters in a batch, for the example."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a server is started.

    Attributes:
        base: What the hub's records call the base.
        others: What they call the bases of LoRA adapters that this server cannot serve.
        adapters: Names whose newest version it can serve.
        refused: Those whose newest version vLLM cannot take, and why.
        environment: Variables to set.
        command: What to run.
    """

    base: str
    others: tuple[str, ...]
    adapters: tuple[str, ...]
    refused: dict[str, str]
    environment: dict[str, str]
    command: tuple[str, ...]


@click.command("serve-plugin")
@click.option("--check", "ref", metavar="REF", help="Resolve one reference into the cache, as the plugin would.")
@click.option("--base", metavar="ID", help="The base as the hub records it. [default: that of most LoRA adapters]")
@click.option(
    "--served-base", metavar="NAME", help="The name or folder that vLLM is given for it. [default: the recorded one]"
)
@json_option
@click.pass_obj
def command(registry: str | None, ref: str | None, base: str | None, served_base: str | None, as_json: bool) -> None:
    """Let vLLM serve the adapters of this hub by their names.

    graftory comes with a plugin that vLLM finds by itself, in the same environment. A server that is asked
    for a model that it does not know then takes it from the hub: NAME (the newest), NAME@3, NAME:ALIAS
    or NAME@sha256:... Every byte is hashed first. This prints how to start such a server.

    \b
    Example:
      hub serve-plugin
      hub serve-plugin --served-base /models/llama-3.2-1b
      hub serve-plugin --check trec@1
    """
    from graftory.hub import Hub

    hub = Hub.open(registry)
    if ref is not None:
        check(hub, ref, base, served_base, as_json)
        return
    plan = make_plan(hub, base, served_base)
    if as_json:
        print_json(
            {
                "registry": str(hub.root),
                "plugin": plugin(),
                "vllm": vllm_version(),
                "base": plan.base,
                "other_bases": plan.others,
                "adapters": plan.adapters,
                "refused": plan.refused,
                "environment": plan.environment,
                "command": plan.command,
            }
        )
    else:
        show(hub, plan)


def check(hub: Hub, ref: str, base: str | None, served_base: str | None, as_json: bool) -> None:
    """Resolve a reference as the plugin would, and say where it lies. Raises as `serve`."""
    from graftory.serving.cache import BASE_VARIABLE, cache_folder, serve

    called = base or os.environ.get(BASE_VARIABLE) or hub.record(ref).spec.base.id
    served = serve(hub, ref, served_base or called, cache_folder(), called=called)
    if as_json:
        print_json({"ref": str(served.ref), "digest": served.digest, "folder": str(served.folder), "id": served.id})
    else:
        click.echo(f"{served.ref}  {served.digest[:19]}  {printable(str(served.folder))}")


def make_plan(hub: Hub, base: str | None, served_base: str | None) -> Plan:
    """How to serve the hub's adapters of one base.

    Raises:
        ConfigError: If the hub has no LoRA adapter of that base, or none at all.
    """
    from graftory.hub.locate import VARIABLE
    from graftory.serving.cache import BASE_VARIABLE

    rows = [row for row in hub.index() if row.method == "lora"]
    bases = [each for each, _ in Counter(row.base for row in rows).most_common()]
    if not bases or base not in (None, *bases):
        known = (
            f"its LoRA adapters are for {', '.join(bases)}" if bases else "it has no LoRA adapter, and vLLM serves LoRA"
        )
        raise ConfigError(f"{hub.root}: nothing to serve{f' on {base!r}' if base else ''}; {known}")
    chosen = base or bases[0]
    records = [hub.record(row.name) for row in rows if row.base == chosen]
    refused = {record.name: reason for record in records if (reason := why_not(record))}
    taken = [record for record in records if record.name not in refused]
    environment = {VARIABLE: str(hub.root), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    if served_base not in (None, chosen):
        environment[BASE_VARIABLE] = chosen
    served = ("vllm", "serve", served_base or chosen)
    limits = ("--enable-lora", "--max-lora-rank", str(server_rank(taken)), "--max-loras", str(LOADED))
    others = tuple(each for each in bases if each != chosen)
    return Plan(chosen, others, tuple(record.name for record in taken), refused, environment, (*served, *limits))


def why_not(record: Record) -> str | None:
    """Why vLLM cannot take an adapter, or None."""
    from graftory.hub.layouts import check_vllm

    try:
        check_vllm(record)
    except UnsupportedAdapterError as error:
        return str(error)
    return None


def server_rank(records: Sequence[Record]) -> int:
    """The least --max-lora-rank that some LoRA adapters, each of one rank, fit into."""
    from graftory.config import LoraConfig

    configs = [record.spec.config for record in records]
    ranks = [config.rank_of(path) for config in configs if isinstance(config, LoraConfig) for path in config.targets]
    return next((rank for rank in RANKS if rank >= max(ranks, default=0)), RANKS[-1])


def plugin() -> str | None:
    """Where vLLM finds the plugin; None if graftory was installed without it."""
    return next((point.value for point in entry_points(group=GROUP, name="graftory")), None)


def vllm_version() -> str | None:
    """The version of vLLM in this environment."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return None


def show(hub: Hub, plan: Plan) -> None:
    """Print how to start a server, ready for a shell."""
    found, server = plugin(), vllm_version()
    click.echo(f"hub     {printable(str(hub.root))}")
    count = len(plan.adapters)
    click.echo(f"base    {printable(plan.base)}, {count} adapter{'s' if count != 1 else ''} to serve")
    for reason in list(plan.refused.values())[:SHOWN]:
        click.echo(f"not     {printable(reason)}")
    if len(plan.refused) > SHOWN:
        click.echo(f"not     {len(plan.refused) - SHOWN} more, see --json")
    if plan.others:
        click.echo(f"others  {printable(', '.join(plan.others))}: each needs a server of its own, see --base")
    click.echo(f"plugin  {found or 'not installed: install graftory again, pip install graftory'}")
    click.echo(f"vLLM    {server or 'not in this environment: install graftory where vLLM is'}")
    click.echo()
    for name, value in plan.environment.items():
        click.echo(printable(f"export {name}={shlex.quote(value)}"))
    click.echo(printable(shlex.join(plan.command)))
    click.echo()
    click.echo('Then ask for "model": "NAME", "NAME@3", "NAME:ALIAS" or "NAME@sha256:..." of the hub.')
    click.echo(
        "A server keeps what a name meant when it was first asked for: to follow an alias, let it unload the name."
    )
