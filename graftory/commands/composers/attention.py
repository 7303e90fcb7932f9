"""`hub compose attention`."""

from __future__ import annotations

from pathlib import Path

import click

from graftory.commands.output import json_option, print_json, print_table, working
from graftory.commands.recorded import subject
from graftory.data import load_rows
from graftory.errors import ConfigError


@click.command("attention")
@click.argument("ref")
@click.option("--task", "tasks", multiple=True, help="Task to read; may be repeated. [default: the fusion's own]")
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
    tasks: tuple[str, ...],
    split: str,
    rows: int | None,
    base: str | None,
    batch_size: int,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Show which adapters a fusion attends to.

    For every place where adapters meet, the weight of each of them: the mean over the tokens of the rows.

    \b
    Example:
      hub compose attention fused --picture attention.png
      hub compose attention fused --task wheel:trec --task wheel:sms --rows 200 --json
    """
    from graftory.compose.attention import attention, draw_attention
    from graftory.hub import Hub
    from graftory.training import load_base

    hub = Hub.open(registry)
    subjects = [subject(hub, ref, source, base) for source in tasks or (None,)]
    kinds = {item.task.kind for item in subjects}
    if len(kinds) > 1:
        raise ConfigError(f"tasks of kinds {', '.join(sorted(kinds))} need different models; give tasks of one kind")
    data = [load_rows(item.task, split, limit=rows) for item in subjects]
    fusion = hub.get(ref)
    with working(f"loading {subjects[0].base}"):
        loaded = load_base(subjects[0].base, subjects[0].task.kind)
    with working(f"reading {sum(map(len, data))} rows"):
        tables = [
            attention(loaded, fusion, item.task, part, batch_size=batch_size)
            for item, part in zip(subjects, data, strict=True)
        ]
    if picture is not None:
        picture.write_bytes(draw_attention(tables))
    if as_json:
        print_json(tables)
        return
    for table in tables:
        click.echo(f"{table.task}, {table.rows} rows of {split}")
        rows_of = [(label, *map(shown, p.weights)) for label, p in zip(table.labels(), table.places, strict=True)]
        print_table(("place", *table.sources), [*rows_of, ("mean", *map(shown, table.mean()))])


def shown(weight: float | None) -> str:
    """A weight in one cell; - where the adapter does not sit."""
    return "-" if weight is None else f"{weight:.3f}"
