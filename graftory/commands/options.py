"""Options of the command line from the typed parameters of methods: a method is a row, never a branch here."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click

from graftory.commands.run_file import FromFile, config_option
from graftory.errors import ConfigError
from graftory.schema import field_types

T = TypeVar("T")
_GIVEN = "graftory.given"

rows_option = click.option(
    "--rows", type=click.IntRange(min=1), help="Train on so many rows of a task, drawn at random. [default: all]"
)
seed_option = click.option(
    "--seed", default=0, show_default=True, help="Seed of initial tensors, order and drawn rows."
)
checkpoints_option = click.option(
    "--checkpoints",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for checkpoints; the same command goes on from the last one after it was cut off.",
)
"""What all commands that train have."""
_TYPES: Mapping[Any, click.ParamType[Any]] = {int: click.INT, float: click.FLOAT, str: click.STRING}


class MethodCommand(FromFile):
    """A command with `--method` and, joined, the options of all methods.

    A field made with `graftory.config.option` becomes an option; its type, default and help come from
    the field. `given_parameters` tells which were given. An option that the command declares itself is
    not derived.
    """

    def __init__(
        self,
        *args: Any,
        methods: Callable[[], Mapping[str, type]],
        default_method: str,
        settings: type | None = None,
        **kwargs: Any,
    ) -> None:
        """Take, beside click's own arguments, the table of methods and settings that all methods share.

        The table is called for when the command is used: it may import what `hub --help` must not.
        """
        super().__init__(*args, **kwargs)
        self.methods = methods
        self.default_method = default_method
        self.settings = settings

    @cached_property
    def derived(self) -> list[click.Parameter]:
        """`--method` and the options of the methods' fields, then those of the shared settings."""
        methods = self.methods()
        choice = click.Option(
            ["--method"],
            type=click.Choice(tuple(methods)),
            default=self.default_method,
            show_default=True,
            help="The method; options below that begin with a method's name are its own.",
        )
        options = [joined_option(name, methods) for name in names_of(methods.values())]
        if self.settings is not None:
            options += [joined_option(name, {"": self.settings}) for name in names_of([self.settings])]
        declared = {parameter.name for parameter in self.params}
        return [choice, *(option for option in options if option.name not in declared), config_option()]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, then the derived ones, then `--help`."""
        last = self.get_help_option(ctx)
        own = [parameter for parameter in super().get_params(ctx) if parameter is not last]
        return [*own, *self.derived, *([last] if last else [])]


def shown_fields(kind: type) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that people may set on the command line."""
    return [field for field in dataclasses.fields(kind) if "help" in field.metadata]


def names_of(kinds: Iterable[type]) -> list[str]:
    """The names of the fields that people may set, each once."""
    return list(dict.fromkeys(field.name for kind in kinds for field in shown_fields(kind)))


def joined_option(name: str, methods: Mapping[str, type]) -> click.Option:
    """One option for a field that one or more methods have."""
    owners = {method: field for method, kind in methods.items() for field in shown_fields(kind) if field.name == name}
    parsers = {method: parser_of(field_types(methods[method])[name]) for method in owners}
    if len(set(map(repr, parsers.values()))) > 1:
        raise TypeError(f"methods {', '.join(owners)} give {name!r} different types: one option cannot stand for both")
    kind = next(iter(parsers.values()))
    flag = name.replace("_", "-")
    return click.Option(
        [f"--{flag}/--no-{flag}" if kind is click.BOOL else f"--{flag}"],
        type=kind,
        default=None,
        help=joined_help(owners),
        expose_value=False,
        callback=remember,
    )


def joined_help(owners: Mapping[str, dataclasses.Field[Any]]) -> str:
    """What the option means and its default, for each method; said once where the methods agree."""
    said: dict[str, list[str]] = {}
    for method, field in owners.items():
        default = "" if field.default is None else f" [default: {field.default}]"
        said.setdefault(f"{field.metadata['help']}{default}", []).append(method)
    return "; ".join(f"{', '.join(methods)}: {text}".removeprefix(": ") for text, methods in said.items())


def parser_of(annotation: Any) -> click.ParamType[Any]:
    """The click type of a field's annotation.

    Raises:
        TypeError: If there is none; that is a mistake in the method's table, not in the command line.
    """
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation))
    if annotation is bool:
        return click.BOOL
    if annotation not in _TYPES:
        raise TypeError(f"no option can hold {annotation}; leave out the field's help or extend parser_of")
    return _TYPES[annotation]


def remember(context: click.Context, parameter: click.Parameter, value: object) -> None:
    """Keep a given value for `given_parameters`."""
    if value is not None and parameter.name is not None:
        context.meta.setdefault(_GIVEN, {})[parameter.name] = value


def given_parameters(method: str, methods: Mapping[str, type], settings: type | None = None) -> dict[str, Any]:
    """The parameters of a method that were given on the command line.

    Raises:
        ConfigError: If an option was given that only other methods have.
    """
    own = names_of([methods[method]])
    shared = names_of([settings] if settings else [])
    for name in _given():
        if name not in own and name not in shared:
            others = [other for other in methods if name in names_of([methods[other]])]
            takes = ", ".join(map(flag_of, own)) or "no options of its own"
            raise ConfigError(
                f"{flag_of(name)} belongs to {', '.join(others)}, not to {method}; {method} takes {takes}"
            )
    return {name: value for name, value in _given().items() if name in own}


def given_settings(settings: type) -> dict[str, Any]:
    """The shared settings that were given on the command line."""
    return {name: value for name, value in _given().items() if name in names_of([settings])}


def _given() -> dict[str, Any]:
    given: dict[str, Any] = click.get_current_context().meta.get(_GIVEN, {})
    return given


def flag_of(name: str) -> str:
    """How a field is spelt on the command line."""
    return "--" + name.replace("_", "-")


def comma_separated(kind: Callable[[str], T], what: str) -> Callable[..., tuple[T, ...] | None]:
    """A callback that reads `a,b,c`; `what` names one item in the error text."""

    def read(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[T, ...] | None:
        if text is None:
            return None
        try:
            return tuple(kind(item.strip()) for item in text.split(","))
        except ValueError as error:
            raise click.BadParameter(f"got {text!r}, wanted {what} separated by commas") from error

    return read
