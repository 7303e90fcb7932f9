"""`--config FILE`: the arguments and options of a command from a YAML, so that a run can be repeated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from graftory.errors import ConfigError
from graftory.schema import Json

FLAG = "--config"


class FromFile(click.Command):
    """A command that can take its arguments from a file."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put what the file says in front of what the command line says."""
        return super().parse_args(ctx, with_file(self, ctx, list(args)))


def config_option() -> click.Option:
    """The option as it stands in the help; it is taken out before the others are read."""
    return click.Option(
        [FLAG],
        metavar="FILE",
        expose_value=False,
        help="Read arguments and options from a YAML, keys as they are called here; what the command line says as well "
        "comes after them and wins.",
    )


def with_file(command: click.Command, context: click.Context, arguments: list[str]) -> list[str]:
    """The arguments, with what the file of `--config` says in front of them.

    Raises:
        ConfigError: If the file cannot be read, or holds what the command does not take.
    """
    rest: list[str] = []
    path: str | None = None
    while arguments:
        argument = arguments.pop(0)
        name, equals, value = argument.partition("=")
        if argument == "--":
            rest += [argument, *arguments]
            break
        if name != FLAG:
            rest.append(argument)
        elif equals:
            path = value
        elif arguments:
            path = arguments.pop(0)
        else:
            raise click.UsageError(f"{FLAG} needs the name of a file", context)
    return rest if path is None else [*_from_file(command, context, Path(path)), *rest]


def _from_file(command: click.Command, context: click.Context, path: Path) -> Iterator[str]:
    values = _read(path)
    positional: dict[str, list[str]] = {}
    for parameter in command.get_params(context):
        for key in _keys(parameter):
            if key not in values or key == FLAG[2:]:
                continue
            value = values.pop(key)
            if isinstance(parameter, click.Option):
                yield from _option(parameter, key, value, path)
            else:
                positional[key] = [_text(item, key, path) for item in (value if isinstance(value, list) else [value])]
    if values:
        known = sorted(
            {key for parameter in command.get_params(context) for key in _keys(parameter)} - {"config", "help"}
        )
        raise ConfigError(
            f"{path}: {next(iter(values))!r} is nothing that this command takes; it takes {', '.join(known)}"
        )
    for items in positional.values():  # in the order of the command's parameters
        yield from items


def _read(path: Path) -> dict[str, Json]:
    import yaml

    try:
        data = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split()):.160})") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{path}: got {type(data).__name__}, wanted keys such as name, method and the adapters' refs")
    return {key.replace("_", "-"): value for key, value in data.items()}


def _keys(parameter: click.Parameter) -> list[str]:
    """What a parameter is called in a file: an option by its long names, an argument by its metavar in lower case."""
    if isinstance(parameter, click.Option):
        return [name[2:] for name in parameter.opts if name.startswith("--")]
    shown = parameter.metavar or parameter.name or ""
    name = shown.lower().removesuffix("...")
    return [f"{name}s" if parameter.nargs == -1 else name]


def _option(option: click.Option, key: str, value: Json, path: Path) -> Iterator[str]:
    if value is None:
        return
    if isinstance(value, bool):
        if not option.is_flag and not option.secondary_opts and option.type is not click.BOOL:
            raise ConfigError(
                f"{path}: {key}: got {str(value).lower()}, wanted a value; write texts such as 'on' in quotes"
            )
        if value or option.secondary_opts:
            yield f"--{key}" if value else option.secondary_opts[0]
    elif isinstance(value, list):
        texts = [_text(item, key, path) for item in value]
        for text in texts if option.multiple else [",".join(texts)]:
            yield f"--{key}={text}"
    else:
        yield f"--{key}={_text(value, key, path)}"


def _text(value: Json, key: str, path: Path) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ConfigError(f"{path}: {key}: got {type(value).__name__} {value!r:.60}, wanted a text or a number")
    return str(value)
