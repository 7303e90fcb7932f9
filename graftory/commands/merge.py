"""`hub merge`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graftory.adapter import Parent
from graftory.commands.ledger import from_record
from graftory.commands.merging.report import Reporter, print_report, report_to_json
from graftory.commands.merging.tuning import AUTO, Tuner, chosen_to_json, print_chosen
from graftory.commands.merging.weights import HELP as WEIGHTS_HELP
from graftory.commands.merging.weights import read_weights
from graftory.commands.options import MethodCommand, given_parameters
from graftory.commands.output import json_option, print_json, print_ref, ref_to_json, working
from graftory.commands.refs import check_distinct
from graftory.commands.selecting import Chooser, print_selection, recorded_inputs
from graftory.settings import SelectSettings

if TYPE_CHECKING:
    from graftory.compose.merge.weighting import Weights


def methods() -> Mapping[str, type]:
    """The parameters of every merge method."""
    from graftory.compose import METHODS
    from graftory.compose.merge.tuning import AutoParameters

    return {**{name: row.params for name, row in METHODS.items()}, AUTO: AutoParameters}


@click.command("merge", cls=MethodCommand, methods=methods, default_method="linear", settings=SelectSettings)
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option("--name", help="Name of the merged adapter in the hub.")
@click.option(
    "--weights",
    callback=read_weights,
    metavar="W,W,...|FILE",
    help=WEIGHTS_HELP,
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
@click.option(
    "--tune",
    "tune",
    metavar="FILE|TASK",
    help="lorahub: the task whose labelled training rows tell the weights; adamerging: unlabelled inputs for all, a "
    ".txt or a task. [default: adamerging: each adapter's own task]",
)
@click.option(
    "--tune-rows",
    type=click.IntRange(min=1),
    help="So many rows to tune on, or of each adapter's own task for auto to judge by, at most; it looks at up to 8 "
    "times as many where an adapter alone may be the better. [default: 16; adamerging and auto: 128]",
)
@click.option(
    "--report",
    "report_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Report what the merge does to each adapter, with a picture of every module (.png, .svg, .pdf) and whether to "
    "merge or to route. Without --name nothing is kept.",
)
@click.option(
    "--report-rows",
    type=click.IntRange(min=1),
    help="Report: measure on so many test rows of each adapter's task; without, from the weights alone.",
)
@click.option(
    "--keep",
    type=click.FloatRange(0, 1),
    help="Report: share of its own adapter's score that every task must keep. [default: 0.95]",
)
@json_option
@click.pass_context
def command(
    context: click.Context,
    refs: tuple[str, ...],
    name: str | None,
    weights: Weights | None,
    selector: str | None,
    examples: str | None,
    encoder: str | None,
    on: str | None,
    on_rows: int | None,
    seed: int,
    again: bool,
    without: tuple[str, ...],
    tune: str | None,
    tune_rows: int | None,
    report_file: Path | None,
    report_rows: int | None,
    keep: float | None,
    method: str,
    as_json: bool,
) -> None:
    """Make one adapter out of several.

    They must be of one base model. In delta space all that change weights (lora, dora, ia3, bitfit, ...) go together;
    others are merged with their own kind. The parents and their weights are recorded: see hub log.
    No model is loaded unless dora, ia3, --select, --by activations, fisher or regmean ask for it. Records tell enough
    to merge again: with --again one merge is held against its record, with --without it is made anew without some of
    its parents.

    \b
    Example:
      hub merge trec sms --method linear --weights 0.5,0.5 --name both
      hub merge run@1 run@2 run@3 --method soup --name average
      hub merge space autos guns med --method soup --select clustering --examples new.txt --name soup
      hub merge amazon movies --method mera --by activations --examples wheel:valence-movie --name aligned
      hub merge run@1 run@2 run@3 --method soup --select greedy --on wheel:trec --name best
      hub merge trec sms spam --method ties --density 0.3 --rank 16 --name trimmed
      hub merge trec sms --weights "0.5,0.5;layer.3.*=1,0" --name by-layer
      hub merge trec sms spam --method auto --name best
      hub merge nli qa --method lorahub --tune few.yaml --name for-few
      hub merge trec sms spam --method adamerging --name sure
      hub merge trec sms spam --method tsv --report why.png --report-rows 200
      hub merge both@1 --again
      hub merge both@1 --without sms --name only-trec
    """
    if again or without:
        from_record(context, refs, again, without, name, weights, as_json)
        return
    if name is None and report_file is None:
        raise click.UsageError("Missing option '--name'.", context)
    reporter = Reporter(report_file, report_rows, keep, seed)
    reporter.check()
    from graftory.compose import merge
    from graftory.compose.merge.loading import base_for
    from graftory.compose.merge.mera import MeraParameters
    from graftory.hub import Hub

    kinds = methods()
    kind: Any = kinds[method]
    drawn = {"seed": seed} if "seed" in kind.__dataclass_fields__ else {}
    parameters = kind(**given_parameters(method, kinds, SelectSettings), **drawn)
    tuner = Tuner(method, tune, tune_rows, seed)
    tuner.check(weights, selector)
    reads = parameters.reads
    observed = examples if reads != "nothing" else None
    anchored = getattr(parameters, "anchor", None) == 0
    given = None if observed and selector not in ("clustering", "similarity") else examples
    chooser = Chooser(selector, given, encoder, on, on_rows, seed, method, parameters, anchored)
    chooser.check(weights)
    hub = Hub.open(context.obj)
    records = [hub.record(ref) for ref in refs]
    check_distinct((str(record.ref), ref) for record, ref in zip(records, refs, strict=True))
    adapters = [hub.get(record.ref) for record in records]
    selection = chooser.choose({str(record.ref): one for record, one in zip(records, adapters, strict=True)})
    if selection is not None:
        kept = [[str(record.ref) for record in records].index(ref) for ref in selection.chosen]
        records, adapters = [records[number] for number in kept], [adapters[number] for number in kept]
    parents = [Parent(str(record.ref), record.digest, "merged") for record in records]
    looks = bool(observed) or reads == "own tasks"
    inputs = recorded_inputs(adapters, observed, seed, gradients=parameters.gradients) if looks else ()
    notes = chooser.notes(selection)
    if inputs:
        notes |= {"seed": seed, **({"examples": observed} if observed else {})}
    if isinstance(parameters, MeraParameters) and anchored:
        parameters, scores = chooser.best_anchor(adapters, parameters, inputs)
        notes |= {"on": on, "seed": seed, "anchors": scores}
    named = dict(zip((str(record.ref) for record in records), adapters, strict=True))
    base, tried = base_for(adapters, "linear" if method == AUTO else method), None
    if method == AUTO:
        tried = tuner.choose(named, parameters.rank, parents, notes)
        merged = tried.adapter
    else:
        found = tuner.tune(adapters, parameters, weights)
        notes |= found.notes
        with working("merging"):
            merged = merge(
                adapters,
                method,
                weights=found.weights,
                parameters=parameters,
                inputs=inputs,
                base=base,
                parents=parents,
                notes=notes,
            )
    report = reporter.report(named, merged, base)
    ref = None if name is None else hub.put(name, merged)
    if as_json:
        told = {} if ref is None else ref_to_json(hub, ref)
        told |= {} if selection is None else {"selection": selection}
        told |= {} if tried is None else {"auto": chosen_to_json(tried)}
        print_json(told | ({} if report is None else {"report": report_to_json(report, report_file)}))
        return
    if selection is not None:
        print_selection(selection)
    if tried is not None:
        print_chosen(tried)
    if report is not None:
        print_report(report, report_file)
    if ref is not None:
        print_ref("merged into", hub, ref, as_json=False)
