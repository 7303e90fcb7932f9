"""`hub compose leave-one-out`."""

from __future__ import annotations

import click

from graftory.commands.eval import check_labels
from graftory.commands.output import json_option, print_json, print_table, working
from graftory.commands.recorded import subject
from graftory.data import load_rows
from graftory.errors import ConfigError


@click.command("leave-one-out")
@click.argument("ref")
@click.option("--task", "source", help="Task to measure on. [default: the fusion's own]")
@click.option("--split", default="test", show_default=True, help="Rows to measure on: test, train or validation.")
@click.option("--rows", type=click.IntRange(min=1), help="Measure on so many rows, drawn at random. [default: all]")
@click.option("--base", help="The base model. [default: the recorded one]")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Rows a batch.")
@json_option
@click.pass_obj
def command(
    registry: str | None,
    ref: str,
    source: str | None,
    split: str,
    rows: int | None,
    base: str | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Measure a fusion without each of its parents.

    Nothing is trained again: what attends does not depend on which adapters there are. All are measured together,
    in batches whose rows use different ones.

    \b
    Example:
      hub compose leave-one-out fused
      hub compose leave-one-out fused --rows 200 --json
    """
    from graftory.compose.attention import source_names
    from graftory.compose.fusion import without
    from graftory.hub import Hub
    from graftory.training import Job, evaluate, load_base

    hub = Hub.open(registry)
    item = subject(hub, ref, source, base)
    data = load_rows(item.task, split, limit=rows)
    check_labels(item, data)
    fusion = hub.get(ref)
    names = source_names(fusion)
    if len(names) < 2:
        raise ConfigError(f"{item.ref} has {len(names)} adapters to leave out, wanted a fusion of two or more")
    rest = {name: without(fusion, number) for number, name in enumerate(names)}
    with working(f"loading {item.base}"):
        loaded = load_base(item.base, item.task.kind)
    jobs = [Job(item.ref, fusion, None, item.task, data), *(Job(n, a, None, item.task, data) for n, a in rest.items())]
    with working(f"measuring {len(jobs)} fusions on {len(data)} rows each"):
        whole, *measured = evaluate(loaded, jobs, batch_size=batch_size)
    if as_json:
        left_out = [{"without": name, "metrics": metrics} for name, metrics in zip(rest, measured, strict=True)]
        print_json({"ref": item.ref, "metrics": whole, "leave_one_out": left_out})
        return
    lines = [("nothing", *(cell for metric in whole for cell in (f"{metric.value:.4f}", "")))]
    for name, metrics in zip(rest, measured, strict=True):
        pairs = zip(metrics, whole, strict=True)
        cells = (cell for m, w in pairs for cell in (f"{m.value:.4f}", f"{m.value - w.value:+.4f}"))
        lines.append((name, *cells))
    columns = (column for metric in whole for column in (metric.name, "change"))
    click.echo(f"{item.ref} on {item.task.name}, {len(data)} rows of {split}")
    print_table(("without", *columns), lines)
