"""`hub demo`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("demo")
@click.option(
    "--dir",
    "folder",
    default="graftory-demo",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that everything is written to; delete it to start over.",
)
def command(folder: Path) -> None:
    """See all of it on real tasks, in a few minutes.

    Trains LoRA and bottleneck adapters for four tasks on MiniLM, keeps them as versions, pushes them to a
    second hub and pulls one back, merges two, evaluates all tasks in mixed batches, learns the four tasks one
    after another, and exports one plain model. Stopped and started again, it goes on where it was. The hub
    you work in is not touched.

    \b
    Example:
      hub demo
      hub demo --dir ~/graftory-demo
    """
    from graftory.demo import run_demo

    run_demo(folder)
