"""Options derived from the typed parameters of methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from graftory.cli import Failure
from graftory.commands.options import MethodCommand, comma_separated, given_parameters, parser_of
from graftory.config import CONFIGS, option
from graftory.errors import ConfigError


@dataclass(frozen=True)
class Alpha:
    rank: int = option("rank of it", 8)
    rate: float = option("a rate", 0.5)
    fast: bool = option("be quick", False)
    kind: Literal["x", "y"] = option("which", "x")
    cut: int | None = option("cut to", None)
    hidden: int = 3


@dataclass(frozen=True)
class Beta:
    rate: float = option("a rate", 0.25)
    width: int = option("how wide", 4)


METHODS: Mapping[str, type] = {"alpha": Alpha, "beta": Beta}


@click.command("try", cls=MethodCommand, methods=lambda: METHODS, default_method="alpha")
def command(method: str) -> None:
    """Print what was given."""
    try:
        click.echo(repr(METHODS[method](**given_parameters(method, METHODS))))
    except ConfigError as error:
        raise Failure(str(error)) from error


def run(*arguments: str) -> Any:
    return CliRunner().invoke(command, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], Alpha()),
        (["--rank", "2", "--rate", "1", "--fast", "--kind", "y", "--cut", "3"], Alpha(2, 1.0, True, "y", 3)),
        (["--no-fast"], Alpha(fast=False)),
        (["--method", "beta", "--rate", "0.125"], Beta(rate=0.125)),
        (["--method", "beta"], Beta()),
    ],
)
def test_options_become_parameters(arguments: list[str], expected: object) -> None:
    assert run(*arguments).output.strip() == repr(expected)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "text"),
    [
        (
            ["--method", "beta", "--rank", "2"],
            1,
            "error: --rank belongs to alpha, not to beta; beta takes --rate, --width",
        ),
        (["--rank", "two"], 2, "'two' is not a valid integer"),
        (["--kind", "z"], 2, "'z' is not one of 'x', 'y'"),
        (["--method", "gamma"], 2, "'gamma' is not one of 'alpha', 'beta'"),
        (["--hidden", "1"], 2, "No such option"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], exit_code: int, text: str) -> None:
    result = run(*arguments)
    assert result.exit_code == exit_code
    assert text in result.stderr


def test_help_names_the_methods_and_their_defaults() -> None:
    words = " ".join(run("--help").output.split())
    assert "alpha: a rate [default: 0.5]; beta: a rate [default: 0.25]" in words
    assert "alpha: cut to" in words
    assert "cut to [default" not in words


def test_one_call_leaves_nothing_for_the_next() -> None:
    assert run("--rank", "2").output.strip() == repr(Alpha(2))
    assert run().output.strip() == repr(Alpha())


def test_a_field_of_two_types_cannot_be_one_option() -> None:
    @dataclass(frozen=True)
    class Gamma:
        rate: int = option("a count", 1)

    broken = MethodCommand("broken", methods=lambda: {"alpha": Alpha, "gamma": Gamma}, default_method="alpha")
    with pytest.raises(TypeError, match="rate"):
        _ = broken.derived


def test_an_annotation_without_an_option_is_refused() -> None:
    with pytest.raises(TypeError, match="tuple"):
        parser_of(tuple[str, ...])


def test_every_adapter_method_has_options() -> None:
    derived = MethodCommand("train", methods=lambda: CONFIGS, default_method="lora").derived
    names = {parameter.name for parameter in derived}
    assert {"method", "rank", "alpha", "rslora", "dropout", "placement", "size", "activation", "scale"} <= names


def test_comma_separated() -> None:
    read = comma_separated(float, "numbers")
    context = click.Context(command)
    assert read(context, command.derived[0], "0.5, 2") == (0.5, 2.0)
    assert read(context, command.derived[0], None) is None
    with pytest.raises(click.BadParameter, match="numbers"):
        read(context, command.derived[0], "0.5;2")
