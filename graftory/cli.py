"""The command `hub`: a table of commands. Each is imported only when it runs, so that `hub --help` is quick."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from importlib import import_module
from typing import IO, Any

import click

from graftory import __version__
from graftory.errors import GraftoryError
from graftory.printable import printable

COMMANDS: Mapping[str, str] = {
    "init": "Create a hub: an empty folder for adapters.",
    "train": "Train an adapter for a task and keep it as a version.",
    "eval": "Measure adapters on the test rows of their tasks.",
    "predict": "Answer texts with an adapter.",
    "list": "List the adapters of the hub.",
    "show": "Show everything that is recorded about an adapter.",
    "log": "Show what an adapter was made from.",
    "diff": "Compare two adapters: what is recorded of them, and their tensors.",
    "add": "Add an adapter from a folder: PEFT's, AdapterHub's or graftory's own.",
    "push": "Send an adapter to a remote hub.",
    "pull": "Fetch an adapter from a remote hub.",
    "alias": "Name a version, or list the names of versions.",
    "remote": "Give remotes short names.",
    "verify": "Check a hub: every byte of every version, its records, aliases and index.",
    "gc": "Remove what no version needs: leftovers of crashes and of broken downloads.",
    "sign": "Sign an adapter, its files and everything it was made from.",
    "keygen": "Make a key to sign adapters with.",
    "merge": "Make one adapter out of several.",
    "convert": "Write a linear adapter of another method as a plain LoRA.",
    "compress": "Make a smaller version of an adapter, and tell what it loses.",
    "compose": "Train a module on top of several adapters.",
    "continual": "Learn tasks one after another, and report what was forgotten.",
    "export": "Fold an adapter into its base and save one plain model, or write its files for another library.",
    "serve-plugin": "Let vLLM serve the adapters of this hub by their names.",
    "demo": "See all of it on real tasks, in a few minutes.",
}
"""Each is `command` in the module of its name in `graftory.commands` (`_` for `-`); its help begins with this line."""


class Failure(click.ClickException):
    """An error of ours, in one line, without a traceback."""

    def format_message(self) -> str:
        """The text on one line, whatever a library put into it."""
        return printable(" ".join(self.message.split()))

    def show(self, file: IO[Any] | None = None) -> None:
        """Print `error: ...` to the standard error."""
        click.echo(f"error: {self.format_message()}", file=file, err=file is None)


class LazyGroup(click.Group):
    """A group that knows its commands from a table and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 (click's signature)
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"graftory.commands.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 (click's signature)
        """The list of commands from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what went wrong on purpose becomes one line and an exit code."""
        try:
            return super().invoke(ctx)
        except GraftoryError as error:
            raise Failure(str(error)) from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)
        except OSError as error:
            if error.errno == errno.EPIPE or error.filename is None:
                raise
            raise Failure(f"{error.filename}: {error.strerror}") from error


@click.group(cls=LazyGroup)
@click.version_option(__version__, prog_name="graftory")
@click.option(
    "--registry",
    type=click.Path(),
    metavar="PATH",
    help="The hub to work in: a folder with a registry.json. Default: $GRAFTORY_REGISTRY, else the nearest "
    "registry.json upward from here, else a hub in your user data folder.",
)
@click.pass_context
def cli(context: click.Context, registry: str | None) -> None:
    """A versioned hub for adapters on Hugging Face models.

    \b
    Example:
      hub list
      hub predict trec "How far is the moon?"
      hub train task.yaml --base bert-base-uncased --method lora
    """
    context.obj = registry


def main() -> None:
    """Run the command line."""
    # it would tell at every start on a CPU of a package that it could do with
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    cli(prog_name="hub")
