"""`hub compose export-task`."""

from __future__ import annotations

import click

from graftory.adapter import Parent, check_name
from graftory.commands.output import json_option, print_ref, working


@click.command("export-task")
@click.argument("ref")
@click.argument("task", metavar="NAME")
@click.option("--name", help="Name of the adapter in the hub. [default: the task's name]")
@json_option
@click.pass_obj
def command(registry: str | None, ref: str, task: str, name: str | None, as_json: bool) -> None:
    """Write one task of a hyperformer as a plain adapter.

    The adapter does exactly what the hyperformer does for that task, and runs, mixes and travels without it.

    \b
    Example:
      hub compose export-task many trec
      hub compose export-task many@2 trec --name trec-generated
    """
    from graftory.compose.hyperformer import task_adapter
    from graftory.hub import Hub

    hub = Hub.open(registry)
    record = hub.record(ref)
    with working(f"making the adapter of {task}"):
        parent = Parent(str(record.ref), record.digest, "generated")
        made = hub.put(check_name(name or task), task_adapter(hub.get(record.ref), task, parent=parent))
    print_ref("made", hub, made, as_json)
