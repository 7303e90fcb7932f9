"""`--again` and `--without` of `hub merge`: merges made again from their records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from graftory.commands.output import print_json, print_ref, working
from graftory.errors import ConfigError

if TYPE_CHECKING:
    from graftory.compose.merge.ledger import Remade
    from graftory.compose.merge.weighting import Weights

_GO_WITH = {"again": {"refs", "again", "as_json"}, "without": {"refs", "without", "name", "weights", "as_json"}}
"""Parameters that go with each; the record says the others."""


def from_record(
    context: click.Context,
    refs: Sequence[str],
    again: bool,
    without: Sequence[str],
    name: str | None,
    weights: Weights | None,
    as_json: bool,
) -> None:
    """Merge again what one record says.

    Raises:
        ConfigError: If options were given that do not go together, or not one adapter.
    """
    asked = "again" if again else "without"
    for parameter in context.command.get_params(context):
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name not in _GO_WITH[asked]:
            raise ConfigError(
                f"{parameter.opts[0]} and --{asked} do not go together: the record says how it was merged"
            )
    if len(refs) != 1:
        raise ConfigError(f"--{asked} takes one adapter, the merge; got {len(refs)}")
    if again:
        remake(context, refs[0], as_json)
    elif name is None:
        raise click.UsageError("Missing option '--name'.", context)
    else:
        leave_out(context, refs[0], without, name, weights, as_json)


def remake(context: click.Context, ref: str, as_json: bool) -> None:
    """Merge again, compare, and exit with 1 if a bit is another one."""
    from graftory.compose.merge.ledger import merge_again
    from graftory.hub import Hub

    hub = Hub.open(context.obj)
    with working("merging again"):
        found = merge_again(hub, ref)
    record = hub.record(ref)
    if as_json:
        told = {"same": found.same, "tensors": len(found.adapter.tensors), "different": found.different}
        told |= {"largest_difference": found.largest, "libraries": found.libraries}
        print_json({"ref": str(record.ref), "digest": record.digest, **told})
    else:
        parents = ", ".join(parent.ref for parent in record.spec.lineage.parents)
        click.echo(f"{record.ref} made again from {parents}: {verdict(found)}")
    context.exit(0 if found.same else 1)


def verdict(found: Remade) -> str:
    """Whether it is the same, and what may be the reason if not."""
    if found.same:
        return f"all {len(found.adapter.tensors)} tensors are the same, bit for bit"
    size = "their shapes too" if found.largest is None else f"by at most {found.largest:.1e}"
    changed = [
        f"{name} {then or 'unknown'} then, {now or 'missing'} now" for name, (then, now) in found.libraries.items()
    ]
    reason = "; ".join(changed) or "no library has changed, so the processor may be another one"
    return f"{len(found.different)} of {len(found.adapter.tensors)} tensors differ, {size} ({reason})"


def leave_out(
    context: click.Context,
    ref: str,
    without: Sequence[str],
    name: str,
    weights: Weights | None,
    as_json: bool,
) -> None:
    """Merge again without some parents, and keep the result."""
    from graftory.compose.merge.ledger import merge_without
    from graftory.hub import Hub

    hub = Hub.open(context.obj)
    with working("merging the others"):
        made = hub.put(name, merge_without(hub, ref, without, weights=weights))
    print_ref("merged into", hub, made, as_json)
