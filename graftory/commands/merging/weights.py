"""`--weights` of `hub merge`: one for each adapter, or by patterns of modules, also from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graftory.errors import ConfigError
from graftory.schema import Json

if TYPE_CHECKING:
    from graftory.compose.merge.weighting import Weights

_ENDINGS = (".yaml", ".yml", ".json")
HELP = (
    "A weight for each adapter; for single modules after PATTERN=, parted by semicolons, one number standing for all "
    "adapters (0.5,0.5;layer.3.*=1,0;*.query=0.2); or a YAML or JSON file that maps patterns to weights, '*' to those "
    "of every other module. The last pattern that fits counts. [default: equal, mostly 1/n]"
)


def read_weights(_context: click.Context, _parameter: click.Parameter, text: str | None) -> Weights | None:
    """A callback that reads the option.

    Raises:
        BadParameter: If it is neither numbers nor patterns with numbers.
        ConfigError: If a file cannot be read or maps something else.
    """
    if text is None:
        return None
    if text.endswith(_ENDINGS):
        return _of_file(Path(text))
    parts = [part.strip() for part in text.split(";") if part.strip()]
    found: dict[str, float | Sequence[float]] = {}
    for part in parts:
        pattern, equals, values = part.rpartition("=")
        pattern = pattern.strip() if equals else "*"
        if pattern in found:
            raise click.BadParameter(f"got weights twice for {pattern!r}; give them once")
        found[pattern] = _numbers(values, text)
    if not found:
        raise click.BadParameter(f"got {text!r}, wanted a number for each adapter, separated by commas")
    alone = found.get("*") if len(found) == 1 else None
    return found if alone is None else alone if isinstance(alone, Sequence) else (alone,)


def _numbers(text: str, whole: str) -> float | tuple[float, ...]:
    try:
        numbers = tuple(float(item) for item in text.split(","))
    except ValueError as error:
        raise click.BadParameter(
            f"got {whole!r}, wanted numbers separated by commas, for single modules after PATTERN="
        ) from error
    return numbers if "," in text else numbers[0]


def _of_file(path: Path) -> Mapping[str, float | Sequence[float]]:
    import yaml

    try:
        data: Json = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split()):.160})") from None
    if not isinstance(data, dict) or not data or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{path}: wanted patterns of modules with their weights, such as 'layer.3.*: [0.5, 1]'")
    return {pattern: _of_json(value, pattern, path) for pattern, value in data.items()}


def _of_json(value: Json, pattern: str, path: Path) -> float | tuple[float, ...]:
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in listed):
        raise ConfigError(
            f"{path}: {pattern!r}: got {value!r:.60}, wanted a number, or a list with one for each adapter"
        )
    return tuple(map(float, listed)) if isinstance(value, list) else float(value)
