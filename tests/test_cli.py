"""The command line as a whole: help, start-up, how errors look."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import graftory
from graftory.cli import COMMANDS, LazyGroup, cli
from graftory.commands import init
from graftory.errors import ConfigError

HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "scipy", "matplotlib", "asyncio")


def walk(command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Command, click.Context]]:
    """Every command of the tree, with its path."""
    yield context.command_path, command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from walk(child, click.Context(child, info_name=name, parent=context))


TREE = list(walk(cli, click.Context(cli, info_name="hub")))


@pytest.mark.parametrize(("path", "command", "context"), TREE, ids=[path for path, _, _ in TREE])
def test_every_command_has_help_with_an_example(path: str, command: click.Command, context: click.Context) -> None:
    text = command.get_help(context)
    example = text.partition("Example:\n")[2]
    calls = [line.strip() for line in example.splitlines() if line.strip().startswith("hub ")]
    assert calls, text
    if not isinstance(command, click.Group):
        assert all(call == path or call.startswith(f"{path} ") for call in calls if call.split()[1] == path.split()[1])
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{path} {parameter.opts[0]} has no help"


@pytest.mark.parametrize(("path", "command", "context"), TREE[1:], ids=[path for path, _, _ in TREE[1:]])
def test_examples_parse(path: str, command: click.Command, context: click.Context) -> None:
    """Each call of an example is accepted by click's parser, so no example names an option that is gone."""
    if isinstance(command, click.Group):
        return
    for line in re.findall(rf"^ *({path}(?: .*)?)$", command.get_help(context).partition("Example:")[2], re.M):
        arguments = [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', line)][len(path.split()) :]
        command.make_context(path, arguments, parent=context.parent)


def test_the_table_says_what_the_commands_say() -> None:
    context = click.Context(cli, info_name="hub")
    for name, line in COMMANDS.items():
        command = cli.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert (command.help or "").splitlines()[0] == line


def test_list_imports_nothing_heavy(tmp_path: Path) -> None:
    assert CliRunner().invoke(cli, ["init", str(tmp_path)]).exit_code == 0
    run = [sys.executable, "-X", "importtime", "-m", "graftory", "--registry", str(tmp_path), "list"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "graftory.hub" in imported
    assert not imported & set(HEAVY)
    other = ("base_check", "diff", "folders", "foreign", "gc", "layouts", "lineage", "signing", "transfer", "verify")
    assert not imported & {f"graftory.hub.{name}" for name in other}, "what other commands need"


def test_help_imports_no_command() -> None:
    code = (
        "import sys; from graftory.cli import cli\n"
        "try: cli(['--help'], prog_name='hub')\n"
        "except SystemExit: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "graftory.cli" in modules
    assert not [name for name in modules if name.startswith(("graftory.commands.", "torch", "graftory.hub"))]


def test_version() -> None:
    result = CliRunner().invoke(cli, ["--version"])
    assert result.output == f"graftory, version {graftory.__version__}\n"


def failing(error: BaseException) -> click.Group:
    """A group like `hub` whose only command raises."""

    class Group(LazyGroup):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            return broken

    @click.command()
    def broken() -> None:
        raise error

    return Group("hub")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConfigError("rank: got 0, wanted 1 or more"), "error: rank: got 0, wanted 1 or more\n"),
        (ConfigError("a library\n  said two lines"), "error: a library said two lines\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "x/registry.json"),
            "error: x/registry.json: Permission denied\n",
        ),
    ],
)
def test_errors_are_one_line(error: Exception, text: str) -> None:
    result = CliRunner().invoke(failing(error), ["broken"])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", text)


def test_interrupt_is_130() -> None:
    result = CliRunner().invoke(failing(KeyboardInterrupt()), ["broken"])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_a_bug_keeps_its_traceback() -> None:
    result = CliRunner().invoke(failing(ZeroDivisionError("bug")), ["broken"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(cli, ["trian"])
    assert result.exit_code == 2
    assert "trian" in result.stderr


def test_command_modules_have_one_command_each() -> None:
    assert isinstance(init.command, click.Command)
    folder = Path(init.__file__).parent
    helpers = {
        "__init__",
        "base",
        "export_formats",
        "ledger",
        "options",
        "output",
        "recorded",
        "refs",
        "run_file",
        "selecting",
        "texts",
    }
    assert {path.stem for path in folder.glob("*.py")} - helpers == {name.replace("-", "_") for name in COMMANDS}
