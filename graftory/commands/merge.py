"""`hub merge`."""

from __future__ import annotations

from collections.abc import Mapping

import click

from graftory.adapter import Parent
from graftory.commands.options import MethodCommand, comma_separated, given_parameters
from graftory.commands.output import json_option, print_ref, working


def methods() -> Mapping[str, type]:
    """The parameters of every merge method."""
    from graftory.compose import METHODS

    return {name: row.params for name, row in METHODS.items()}


@click.command("merge", cls=MethodCommand, methods=methods, default_method="linear")
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option("--name", required=True, help="Name of the merged adapter in the hub.")
@click.option(
    "--weights",
    callback=comma_separated(float, "numbers"),
    metavar="W,W,...",
    help="A weight for each adapter. [default: equal, 1/n]",
)
@json_option
@click.pass_obj
def command(
    registry: str | None,
    refs: tuple[str, ...],
    name: str,
    weights: tuple[float, ...] | None,
    method: str,
    as_json: bool,
) -> None:
    """Make one adapter out of several.

    They must be of one method and one base model. No model is loaded. The parents and their weights
    are recorded: see hub log.

    \b
    Example:
      hub merge trec sms --method linear --weights 0.5,0.5 --name both
      hub merge run@1 run@2 run@3 --method soup --name average
    """
    from graftory.compose import merge
    from graftory.hub import Hub

    parameters = given_parameters(method, methods())
    hub = Hub.open(registry)
    records = [hub.record(ref) for ref in refs]
    parents = [Parent(str(record.ref), record.digest, "merged") for record in records]
    with working("merging"):
        adapters = [hub.get(ref) for ref in refs]
        merged = merge(adapters, method, weights=weights, parents=parents, **parameters)
        ref = hub.put(name, merged)
    print_ref("merged into", hub, ref, as_json)
