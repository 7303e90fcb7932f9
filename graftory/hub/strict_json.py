"""JSON from strangers: `json.loads` without what makes it lenient or unbounded."""

from __future__ import annotations

import json
import math
import re

from graftory.errors import CorruptAdapterError
from graftory.schema import Json

SMALL = 1 << 20
"""Most bytes of a JSON file that an adapter brings along (1 MiB)."""
LARGE = 16 << 20
"""Most bytes of a record or an index (16 MiB)."""
MAX_DEPTH = 32
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_DIGITS = 20
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{\]}]', re.DOTALL)
"""A string, to the end of the text if it has none, or a bracket. It never goes back, so it takes linear time."""


def loads(data: bytes, where: str, *, limit: int = SMALL) -> Json:
    """Parse JSON strictly.

    Args:
        data: The bytes, UTF-8 without byte-order mark.
        where: The file they came from, for the error text.
        limit: Most bytes accepted; nothing longer is looked at.

    Raises:
        CorruptAdapterError: If it is too long, not UTF-8, not JSON, nested deeper than 32 levels,
            gives a key twice, or holds NaN, an infinity, an integer of more than 20 digits, -0 or half of a
            surrogate pair.
    """
    if len(data) > limit:
        raise CorruptAdapterError(f"{where}: {len(data)} bytes of JSON, at most {limit} are accepted; shorten the file")
    try:
        text = data.decode("utf-8")
        _check_depth(text)
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
        if "\\u" in text:
            _check_surrogates(value)
    except (ValueError, RecursionError) as error:
        raise CorruptAdapterError(f"{where}: not acceptable JSON ({error}); write the file again") from None
    return value


def _check_depth(text: str) -> None:
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += _STEPS.get(token[0], 0)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _check_surrogates(value: Json) -> None:
    """Refuse text that cannot be written as UTF-8 again: neither hashed nor printed."""
    if isinstance(value, str) and _SURROGATE.search(value):
        raise ValueError(f"half of a surrogate pair in {value!r:.80}")
    for item in (
        (*value.keys(), *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        _check_surrogates(item)


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result: dict[str, Json] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r:.80} is given twice")
        result[key] = value
    return result


def _refuse_constant(text: str) -> Json:
    raise ValueError(f"{text} is not a JSON number")


def _bounded_int(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is not an integer that others read")
    if len(text.lstrip("-")) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} overflows a float")
    return value
