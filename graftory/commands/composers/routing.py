"""`hub compose routing`."""

from __future__ import annotations

from pathlib import Path

import click

from graftory.commands.output import json_option, print_json, print_table, working
from graftory.commands.recorded import subject
from graftory.data import load_rows


@click.command("routing")
@click.argument("ref")
@click.argument("task_source", metavar="[TASK]", required=False)
@click.option("--split", default="test", show_default=True, help="Rows to read: test, train or validation.")
@click.option("--rows", type=click.IntRange(min=1), help="Read so many rows, drawn at random. [default: all]")
@click.option("--base", help="The base model. [default: the recorded one]")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Rows a batch.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw it too, as a PNG file.")
@json_option
@click.pass_obj
def command(
    registry: str | None,
    ref: str,
    task_source: str | None,
    split: str,
    rows: int | None,
    base: str | None,
    batch_size: int,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Show which prompt of a SMoP takes which rows.

    For every label, the share of its rows that each prompt takes; TASK is by default the one it was trained on.

    \b
    Example:
      hub compose routing prompts --picture routing.png
      hub compose routing prompts wheel:sms --rows 200 --json
    """
    from graftory.compose.routing import draw_routing, routing
    from graftory.compose.smop import smop_config_of
    from graftory.hub import Hub
    from graftory.training import load_base

    hub = Hub.open(registry)
    adapter = hub.get(ref)
    smop_config_of(adapter)
    item = subject(hub, ref, task_source, base)
    data = load_rows(item.task, split, limit=rows)
    with working(f"loading {item.base}"):
        loaded = load_base(item.base, item.task.kind)
    with working(f"routing {len(data)} rows"):
        table = routing(loaded, adapter, item.task, data, batch_size=batch_size)
    if picture is not None:
        picture.write_bytes(draw_routing(table))
    if as_json:
        print_json(table)
        return
    click.echo(f"{item.ref} on {table.task}, {table.rows} rows of {split}")
    lines = [(label.label, str(label.rows), *map(_shown, label.shares)) for label in table.labels]
    numbers = [f"prompt {number + 1}" for number in range(table.prompts)]
    print_table(("label", "rows", *numbers), [*lines, ("all", str(table.rows), *map(_shown, table.shares))])
    click.echo(f"mean weight of the chosen prompt {table.confidence:.3f}, {1 / table.prompts:.3f} if all were alike")


def _shown(share: float) -> str:
    return f"{share:.3f}"
