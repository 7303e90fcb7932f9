"""`hub merge`."""

from __future__ import annotations

from collections.abc import Mapping

import click

from graftory.adapter import Parent
from graftory.commands.options import MethodCommand, comma_separated, given_parameters
from graftory.commands.output import json_option, print_ref, working
from graftory.commands.selecting import Chooser, print_selection, recorded_inputs
from graftory.settings import SelectSettings


def methods() -> Mapping[str, type]:
    """The parameters of every merge method."""
    from graftory.compose import METHODS

    return {name: row.params for name, row in METHODS.items()}


@click.command("merge", cls=MethodCommand, methods=methods, default_method="linear", settings=SelectSettings)
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option("--name", required=True, help="Name of the merged adapter in the hub.")
@click.option(
    "--weights",
    callback=comma_separated(float, "numbers"),
    metavar="W,W,...",
    help="A weight for each adapter. [default: equal, 1/n]",
)
@click.option(
    "--select",
    "selector",
    type=click.Choice(["clustering", "similarity", "greedy", "same-track"]),
    help="Merge only those of REF that suit a new domain: by unlabelled --examples, greedy by trying on --on, or those "
    "with the labels of --on.",
)
@click.option(
    "--examples",
    metavar="FILE|TASK",
    help="Examples of the new domain, to select or compare activations by: a .txt with one a line, or a task's texts.",
)
@click.option("--encoder", help="The model that encodes the examples. [default: the adapters' base]")
@click.option(
    "--on",
    metavar="TASK",
    help="The task whose training rows decide, for greedy and --anchor 0, or whose labels, for same-track.",
)
@click.option("--on-rows", type=click.IntRange(min=1), help="So many of its rows. [default: all]")
@click.option("--seed", default=0, show_default=True, help="Seed of drawn examples and of the clustering.")
@json_option
@click.pass_obj
def command(
    registry: str | None,
    refs: tuple[str, ...],
    name: str,
    weights: tuple[float, ...] | None,
    selector: str | None,
    examples: str | None,
    encoder: str | None,
    on: str | None,
    on_rows: int | None,
    seed: int,
    method: str,
    as_json: bool,
) -> None:
    """Make one adapter out of several.

    They must be of one method and one base model. The parents and their weights are recorded: see hub log.
    No model is loaded unless --select or --by activations asks for it.

    \b
    Example:
      hub merge trec sms --method linear --weights 0.5,0.5 --name both
      hub merge run@1 run@2 run@3 --method soup --name average
      hub merge space autos guns med --method soup --select clustering --examples new.txt --name soup
      hub merge amazon movies --method mera --by activations --examples wheel:valence-movie --name aligned
      hub merge run@1 run@2 run@3 --method soup --select greedy --on wheel:trec --name best
    """
    from graftory.compose import METHODS, merge
    from graftory.compose.merge.mera import MeraParameters
    from graftory.hub import Hub

    parameters = METHODS[method].params(**given_parameters(method, methods(), SelectSettings))
    observed = examples if getattr(parameters, "by", None) == "activations" else None
    anchored = getattr(parameters, "anchor", None) == 0
    given = None if observed and selector not in ("clustering", "similarity") else examples
    chooser = Chooser(selector, given, encoder, on, on_rows, seed, method, anchored)
    chooser.check(weights)
    hub = Hub.open(registry)
    records = [hub.record(ref) for ref in refs]
    adapters = [hub.get(record.ref) for record in records]
    selection = chooser.choose({str(record.ref): one for record, one in zip(records, adapters, strict=True)})
    if selection is not None:
        kept = [[str(record.ref) for record in records].index(ref) for ref in selection.chosen]
        records, adapters = [records[number] for number in kept], [adapters[number] for number in kept]
    parents = [Parent(str(record.ref), record.digest, "merged") for record in records]
    inputs = recorded_inputs(adapters, observed, seed) if observed else ()
    notes = {**chooser.notes(selection), **({"examples": observed, "seed": seed} if observed else {})}
    if isinstance(parameters, MeraParameters) and anchored:
        parameters, scores = chooser.best_anchor(adapters, parameters, inputs)
        notes |= {"on": on, "seed": seed, "anchors": scores}
    with working("merging"):
        merged = merge(
            adapters, method, weights=weights, parameters=parameters, inputs=inputs, parents=parents, notes=notes
        )
        ref = hub.put(name, merged)
    if selection is None:
        print_ref("merged into", hub, ref, as_json)
    else:
        print_selection(selection, hub, ref, as_json)
