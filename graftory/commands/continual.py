"""`hub continual`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graftory.commands.output import json_option, print_json, print_table

if TYPE_CHECKING:
    from graftory.continual import Event, Report


@click.group("continual")
def command() -> None:
    """Learn tasks one after another, and report what was forgotten.

    \b
    Example:
      hub continual run sequence.yaml
      hub continual report my-sequence-isolated my-sequence-seq
    """


@command.command("run")
@click.argument("file", metavar="FILE.yaml", type=click.Path(path_type=Path))
@click.option("--strategy", help="How to learn: isolated or seq. [default: the file's]")
@click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the run: state, report, pictures. [default: NAME-STRATEGY]",
)
@json_option
@click.pass_obj
def run(registry: str | None, file: Path, strategy: str | None, folder: Path | None, as_json: bool) -> None:
    """Learn the tasks of a sequence, one after another.

    Every step becomes a version in the hub. A run that was stopped goes on with the task it was at; a
    finished one is only reported. The report says how well each task is answered after each step, with
    the task given and, where the strategy allows, with the router choosing the adapter.

    \b
    Example:
      hub continual run sequence.yaml
      hub continual run sequence.yaml --strategy seq --dir runs/seq
    """
    from graftory.continual import load_sequence, run_sequence
    from graftory.hub import Hub

    sequence = load_sequence(file)
    if strategy is not None:
        sequence = replace(sequence, strategy=strategy)
    hub = Hub.open(registry)
    folder = folder or Path(f"{sequence.name}-{sequence.strategy}")
    total = len(sequence.tasks)
    report = run_sequence(sequence, hub, folder, progress=lambda event: announce(event, total))
    show([report], [folder], as_json)


@command.command("report")
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def report(folders: tuple[Path, ...], as_json: bool) -> None:
    """Compare finished runs in one table.

    \b
    Example:
      hub continual report my-sequence-isolated my-sequence-seq
      hub continual report my-sequence-isolated --json
    """
    from graftory.continual import load_report

    show([load_report(folder) for folder in folders], folders, as_json)


def announce(event: Event, total: int) -> None:
    """Say on the standard error which phase begins."""
    click.echo(f"task {event.step} of {total}, {event.task}: {event.phase}", err=True)


def show(reports: Sequence[Report], folders: Sequence[Path], as_json: bool) -> None:
    """Print runs as a table and where their reports are, or all of it as JSON."""
    from graftory.continual import compare_runs

    if as_json:
        print_json(reports[0] if len(reports) == 1 else list(reports))
        return
    rows = compare_runs(reports)
    print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    for folder in folders:
        click.echo(f"report: {folder / 'report.md'}")
        for picture in sorted(folder.glob("*.png")):
            click.echo(f"picture: {picture}")
