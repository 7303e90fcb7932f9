"""`hub compose suggest`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from graftory.adapter import TASK_SOURCE
from graftory.commands.composers.settings import SettingsCommand
from graftory.commands.options import given_settings
from graftory.commands.output import json_option, print_json, print_table, working
from graftory.data import load_rows, load_task
from graftory.errors import ConfigError
from graftory.settings import SelectSettings

if TYPE_CHECKING:
    from graftory.hub import Hub, Record


@click.command("suggest", cls=SettingsCommand, settings=(SelectSettings,))
@click.argument("task_source", metavar="TASK")
@click.argument("refs", metavar="[REF]...", nargs=-1)
@click.option("--base", help="Only adapters of this base model. [default: the one that most have]")
@click.option("--encoder", help="The model that encodes examples. [default: the base]")
@click.option("--seed", default=0, show_default=True, help="Seed of drawn examples and of the clustering.")
@json_option
@click.pass_obj
def command(
    registry: str | None,
    task_source: str,
    refs: tuple[str, ...],
    base: str | None,
    encoder: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Propose parents for a new task, with reasons.

    Examples of TASK are compared with examples of what each adapter was trained on, and adapters' updates with
    each other. Without REF all names of the hub are judged. TASK's labels are not used.

    \b
    Example:
      hub compose suggest wheel:valence-tweets
      hub compose suggest task.yaml trec sms disaster --json
    """
    from graftory.compose.select import encode_domains
    from graftory.compose.select.suggest import suggest
    from graftory.hub import Hub
    from graftory.training import load_base

    hub = Hub.open(registry)
    task = load_task(task_source)
    records, left_out = candidates(hub, refs, base)
    settings = SelectSettings(**given_settings(SelectSettings))
    adapters = {str(record.ref): hub.get(record.ref) for record in records}
    model = encoder or records[0].spec.base.id
    with working(f"loading {model}"):
        loaded = load_base(model, "classification" if encoder else task.kind)
    with working(f"encoding examples of {len(adapters) + 1} tasks"):
        domains, new = encode_domains(loaded, adapters, task_source, limit=settings.per_domain, seed=seed)
    labels = load_rows(task, "train", limit=1).labels if task.kind == "classification" else ()
    found = suggest(adapters, domains, new, labels, settings, seed=seed)
    if as_json:
        print_json({"task": task.name, "base": records[0].spec.base.id, "adapters": found, "left_out": left_out})
        return
    print_table(
        ("adapter", "take", "nearest by weights", "because"),
        [
            (
                item.name,
                "yes" if item.suggested else "no",
                f"{item.nearest} {item.weights:+.2f}" if item.nearest else "-",
                "; ".join(item.reasons),
            )
            for item in found
        ],
    )
    for name, why in left_out.items():
        click.echo(f"{name} is left out: {why}")
    chosen = " ".join(item.name for item in found if item.suggested)
    if chosen:
        click.echo(f"\nhub compose fusion {task_source} {chosen} --name NAME")


def candidates(hub: Hub, refs: tuple[str, ...], base: str | None) -> tuple[list[Record], dict[str, str]]:
    """The adapters to judge, of one base, and why others are not among them.

    Raises:
        ConfigError: If there is none.
    """
    records = [hub.record(ref) for ref in (refs or [row.name for row in hub.index()])]
    bases = [record.spec.base.id for record in records]
    wanted = base or max(bases, key=bases.count, default=None)
    kept, left_out = [], {}
    for record in records:
        if record.spec.base.id != wanted:
            left_out[str(record.ref)] = f"its base is {record.spec.base.id}"
        elif not isinstance(record.spec.lineage.parameters.get(TASK_SOURCE), str):
            left_out[str(record.ref)] = "its record does not name the task it was trained on"
        elif any(parent.relation == "composed" for parent in record.spec.lineage.parents):
            left_out[str(record.ref)] = "it is a composition itself"
        else:
            kept.append(record)
    if not kept:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "the hub is empty"
        raise ConfigError(f"no adapter to suggest ({why}); train some with hub train, or give --base")
    return kept, left_out
