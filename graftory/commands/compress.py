"""`hub compress`."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import click

from graftory.adapter import Adapter, Metric, Parent, Storage, check_name
from graftory.commands.output import json_option, print_json, print_table, working
from graftory.schema import encode

if TYPE_CHECKING:
    from graftory.compose.compress import Compressed
    from graftory.hub import Hub


@click.command("compress")
@click.argument("ref")
@click.option(
    "--storage",
    type=click.Choice(get_args(Storage)),
    default="full",
    show_default=True,
    help="How tensors are written: 8bit (a scale for each row), 1bit (two levels for each tensor, BI-Adapter), "
    "bitdelta (signs and one scale).",
)
@click.option("--rank", type=click.IntRange(min=1), help="Keep the first so many ranks of what dylora trained.")
@click.option(
    "--drop-layers", type=click.IntRange(min=0), default=0, help="Take the adapters of the first so many layers away."
)
@click.option("--name", help="Name of the smaller adapter. [default: the same, as its next version]")
@click.option("--measure", is_flag=True, help="Measure both on the test rows of the task.")
@click.option("--task", "source", help="Task to measure them on. [default: the recorded one]")
@click.option("--rows", type=click.IntRange(min=1), help="Measure on so many rows, drawn at random. [default: all]")
@click.option("--base", help="The base model to measure with. [default: the recorded one]")
@json_option
@click.pass_obj
def command(
    registry: str | None,
    ref: str,
    storage: Storage,
    rank: int | None,
    drop_layers: int,
    name: str | None,
    measure: bool,
    source: str | None,
    rows: int | None,
    base: str | None,
    as_json: bool,
) -> None:
    """Make a smaller version of an adapter, and tell what it loses.

    The smaller one is a version of its own, whose parent is the original. It is used as any other: what is packed is
    unpacked as it is read. What it has lost is in its record: of ΔW, of what a bottleneck returns, and, with --measure,
    the metrics before and after.

    \b
    Example:
      hub compress trec --storage 8bit
      hub compress trec@1 --storage 1bit --measure --rows 200 --name trec-small
      hub compress elastic --rank 2
      hub compress robust --drop-layers 3
    """
    from graftory.compose.compress import compress
    from graftory.hub import Hub

    hub = Hub.open(registry)
    record = hub.record(ref)
    kept_as = check_name(name or record.name)
    adapter = hub.get(record.ref)
    parent = Parent(str(record.ref), record.digest, "compressed")
    made = compress(adapter, storage=storage, rank=rank, drop_layers=drop_layers, parent=parent)
    before: tuple[Metric, ...] = ()
    after: tuple[Metric, ...] = ()
    if measure or source or rows or base:
        before, after = measured(hub, str(record.ref), made, adapter, source, rows, base)
    kept = hub.put(kept_as, made.recorded(after, before))
    if as_json:
        print_json(
            {
                "ref": str(kept),
                "digest": hub.record(kept).digest,
                "parent": str(record.ref),
                "bytes": {"before": made.before, "after": made.after},
                "loss": encode(made.loss),
                "metrics": [
                    {"before": encode(old), "after": encode(new)} for old, new in zip(before, after, strict=True)
                ],
            }
        )
        return
    click.echo(f"compressed {record.ref} to {kept}: {made.before:,} bytes to {made.after:,}")
    lost = {"weights": made.loss.weights, "updates": made.loss.update, "outputs": made.loss.outputs}
    said = [(f"relative error of {what}", f"{value:.4f}") for what, value in lost.items() if value is not None]
    said += [
        (f"{new.name}, {new.n} rows", f"{old.value:.4f} -> {new.value:.4f}")
        for old, new in zip(before, after, strict=True)
    ]
    print_table(("lost", "value"), said)


def measured(
    hub: Hub, ref: str, made: Compressed, adapter: Adapter, source: str | None, rows: int | None, base: str | None
) -> tuple[tuple[Metric, ...], tuple[Metric, ...]]:
    """The metrics of the original and of the smaller one, in one mixed batch."""
    from graftory.commands.eval import check_labels
    from graftory.commands.recorded import subject
    from graftory.data import load_rows
    from graftory.training import Job, evaluate, load_base

    item = subject(hub, ref, source, base)
    data = load_rows(item.task, "test", limit=rows)
    check_labels(item, data)
    with working(f"loading {item.base}"):
        loaded = load_base(item.base, item.task.kind)
    jobs = [Job("before", adapter, None, item.task, data), Job("after", made.decoded, None, item.task, data)]
    with working(f"measuring both on {len(data)} rows"):
        before, after = evaluate(loaded, jobs)
    return before, after
