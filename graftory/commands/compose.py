"""`hub compose`: a table of subcommands, each imported only when it runs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import click

SUBCOMMANDS: Mapping[str, str] = {
    "suggest": "Propose parents for a new task, with reasons.",
    "fusion": "Attend over the outputs of several adapters (AdapterFusion).",
    "hyperformer": "Train one generator of adapters on several tasks (Hyperformer).",
    "pha": "Train one generator of adapters with prototypes of its tasks (PHA).",
    "export-task": "Write one task of a hyperformer as a plain adapter.",
    "attention": "Show which adapters a fusion attends to.",
    "leave-one-out": "Measure a fusion without each of its parents.",
    "smop": "Train short prompts and a router that picks one for each row (SMoP).",
    "routing": "Show which prompt of a SMoP takes which rows.",
}
"""Each is `command` in the module of its name (- as _) in `graftory.commands.composers`; its help begins with this."""


class Subcommands(click.Group):
    """A group that knows its commands from the table."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        """The names, in the order of the table."""
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 (click's signature)
        """Import one subcommand."""
        if cmd_name not in SUBCOMMANDS:
            return None
        module = import_module(f"graftory.commands.composers.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 (click's signature)
        """The list of subcommands from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl(list(SUBCOMMANDS.items()))


@click.group("compose", cls=Subcommands)
def command() -> None:
    """Train a module on top of several adapters.

    The adapters stay as they are and become the parents of the module, which is a version like any other:
    hub eval, predict, push and log take it. To turn adapters into one plain adapter, use hub merge.

    \b
    Example:
      hub compose fusion wheel:trec trec sms disaster --name fused
      hub compose leave-one-out fused
    """
