"""Frozen dataclasses to JSON and back, strictly: unknown, missing or ill-typed values are errors."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from graftory.errors import ConfigError

T = TypeVar("T")
Json = Any
"""What `json.loads` returns: None, bool, int, float, str, list or dict of these."""


def encode(value: Any) -> Json:
    """Turn a dataclass (or tuple, mapping, scalar) into plain JSON values.

    A whole number in a field of floats is written as a float (16 as 16.0), so that equal values have
    equal bytes whoever made them.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _encode_field(kind, getattr(value, name)) for name, kind in field_types(type(value)).items()}
    if isinstance(value, Mapping):
        return {str(key): encode(value[key]) for key in sorted(value)}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def _encode_field(kind: Any, value: Any) -> Json:
    plain = encode(value)
    return _as_floats(plain) if float in (kind, *get_args(kind)) else plain


def _as_floats(plain: Json) -> Json:
    if isinstance(plain, dict):
        return {key: _as_floats(item) for key, item in plain.items()}
    if isinstance(plain, list):
        return [_as_floats(item) for item in plain]
    return float(plain) if isinstance(plain, int) and not isinstance(plain, bool) else plain


def canonical(value: Any) -> bytes:
    """The one byte string of a JSON value: sorted keys, no spaces, UTF-8. Digests are taken over it.

    Raises:
        ValueError: If a number is NaN or infinite.
    """
    text = json.dumps(encode(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def pretty(value: Any) -> bytes:
    """The readable byte string of a JSON value, for files that people open."""
    return (json.dumps(encode(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def decode(kind: type[T], data: Json, where: str) -> T:
    """Build `kind` from plain JSON values.

    Args:
        kind: A dataclass, or any annotation its fields may have.
        data: Plain JSON values.
        where: What is being read, for the error text: a file name or an option.

    Raises:
        ConfigError: If a key is unknown or missing, or a value has the wrong type.
    """
    result: T = _decode(kind, data, where)
    return result


@cache
def field_types(kind: type) -> dict[str, Any]:
    """The resolved annotations of a dataclass, in field order."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _decode(kind: Any, data: Json, where: str) -> Any:
    if kind is Any:
        return data
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, data, where)
    if origin in (Union, types.UnionType):
        return _decode_union(kind, data, where)
    if origin is Literal:
        if data not in get_args(kind):
            raise ConfigError(f"{where}: got {data!r}, wanted one of {', '.join(map(repr, get_args(kind)))}")
        return data
    if origin is tuple:
        _expect(list, data, where)
        return tuple(_decode(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin in (Mapping, dict):
        _expect(dict, data, where)
        return {key: _decode(get_args(kind)[1], item, f"{where}.{_shown(key)}") for key, item in data.items()}
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    _expect(kind, data, where)
    return data


def _shown(key: str) -> str:
    return key if key.isprintable() and len(key) <= 80 else f"{key!r:.80}"


def _decode_dataclass(kind: type, data: Json, where: str) -> Any:
    _expect(dict, data, where)
    types_of = field_types(kind)
    unknown = sorted(set(data) - set(types_of))
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; it takes {', '.join(types_of)}")
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.name not in data
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: {missing[0]!r} is missing")
    return kind(**{name: _decode(types_of[name], item, f"{where}.{name}") for name, item in data.items()})


def _decode_union(kind: Any, data: Json, where: str) -> Any:
    if data is None and type(None) in get_args(kind):
        return None
    problem: ConfigError | None = None
    for option in get_args(kind):
        if option is type(None):
            continue
        try:
            return _decode(option, data, where)
        except ConfigError as error:
            problem = problem or error
    raise problem or ConfigError(f"{where}: got {data!r}")


def _expect(kind: type, data: Json, where: str) -> None:
    wrong_bool = isinstance(data, bool) and kind is not bool
    if wrong_bool or not isinstance(data, kind):
        raise ConfigError(f"{where}: got {type(data).__name__} {data!r:.60}, wanted {kind.__name__}")
