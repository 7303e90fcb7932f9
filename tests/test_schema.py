"""Frozen dataclasses to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from graftory.errors import ConfigError
from graftory.schema import canonical, decode, encode


@dataclass(frozen=True)
class Inner:
    rate: float
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    name: str
    mode: Literal["fast", "slow"]
    inner: Inner | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    row: tuple[float, ...] = ()
    free: Any = None
    on: bool = False


def test_round_trip() -> None:
    value = Outer("n", "fast", Inner(0.5, ("a", "b")), {"x": 1.5}, (0.5, 2.0), {"k": [1]}, True)
    assert decode(Outer, encode(value), "file") == value


def test_equal_values_have_equal_bytes() -> None:
    whole, real = Outer("n", "fast", Inner(2), {"x": 3}, (1,)), Outer("n", "fast", Inner(2.0), {"x": 3.0}, (1.0,))
    assert canonical(whole) == canonical(real)
    assert canonical({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"name": "n", "mode": "fast", "colour": 1}, "file: unknown key 'colour'; it takes name, mode"),
        ({"mode": "fast"}, "file: 'name' is missing"),
        ({"name": 3, "mode": "fast"}, "file.name: got int 3, wanted str"),
        ({"name": "n", "mode": "medium"}, "file.mode: got 'medium', wanted one of 'fast', 'slow'"),
        ({"name": "n", "mode": "fast", "inner": {"rate": True}}, "file.inner.rate: got bool True, wanted float"),
        ({"name": "n", "mode": "fast", "weights": {"x": "y"}}, "file.weights.x: got str 'y', wanted float"),
        ({"name": "n", "mode": "fast", "on": 1}, "file.on: got int 1, wanted bool"),
        ([], "file: got list"),
    ],
)
def test_what_does_not_fit_is_named(data: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(Outer, data, "file")
    assert str(caught.value).startswith(said)


def test_numbers_that_json_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"x": float("nan")})
