"""`hub convert`."""

from __future__ import annotations

import click

from graftory.adapter import Parent, check_name
from graftory.commands.output import json_option, print_json, print_ref, print_table, ref_to_json, working


@click.command("convert")
@click.argument("ref")
@click.option("--name", required=True, help="Name of the LoRA in the hub.")
@click.option("--rank", type=click.IntRange(min=1), help="Rank of the LoRA. [default: as much as it takes, exactly]")
@click.option("--base", help="The base model, where the update depends on it. [default: the recorded one]")
@json_option
@click.pass_obj
def command(registry: str | None, ref: str, name: str, rank: int | None, base: str | None, as_json: bool) -> None:
    """Write a linear adapter of another method as a plain LoRA.

    For adapters of methods that other libraries do not read, or not together: lokr, loha, vera, adalora, oft, dora and
    others. Prints how far the LoRA is from the original: |ΔW − s B A| / |ΔW|, over all modules and of the worst one.

    \b
    Example:
      hub convert trec-lokr --name trec-lora
      hub convert trec-lokr@2 --rank 16 --name trec-lora --json
    """
    from graftory.compose import needs_base, to_lora
    from graftory.hub import Hub
    from graftory.training import load_base

    hub = Hub.open(registry)
    record, adapter = hub.record(ref), hub.get(ref)
    model = None
    if needs_base([adapter]):
        chosen = base or record.spec.base.id
        with working(f"loading {chosen}"):
            model = load_base(chosen, record.spec.task.kind if record.spec.task else "classification").model
    with working("converting"):
        made = to_lora(adapter, rank=rank, base=model, parent=Parent(str(record.ref), record.digest, "generated"))
    kept = hub.put(check_name(name), made.adapter)
    if as_json:
        print_json({**ref_to_json(hub, kept), "error": made.error, "errors": made.errors})
        return
    print_ref("made", hub, kept, as_json)
    worst = max(made.errors, key=lambda path: made.errors[path])
    print_table(
        ("module", "relative error"), [("all", f"{made.error:.2e}"), (f"{worst} (worst)", f"{made.errors[worst]:.2e}")]
    )
