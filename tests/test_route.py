"""Routes: what is known of a batch before it runs."""

from __future__ import annotations

import pytest
import torch

from graftory.adapters.route import Attached, Row, make_route

KNOWN = {"a": Attached("slot0", has_head=False), "b": Attached("slot1", has_head=False)}


@pytest.mark.parametrize(
    ("rows", "full"),
    [
        ("a", True),
        (["a", None, "b"], True),
        ([{"a": 0.5, "b": 0.5}, None, {"b": 1.0, "a": 2.0}], True),
        (["a", {"a": 0.5, "b": 0.5}, None], False),
    ],
)
def test_it_is_known_whether_all_rows_have_as_many_adapters(rows: str | list[Row], full: bool) -> None:
    selection = make_route(rows, None, KNOWN).select(("slot1", "slot0"), torch.zeros(3, 1))
    assert selection is not None
    assert selection.full is full
    assert bool((selection.index >= 0).all()) is full
    assert all(part.full for part in selection.apart())
    assert all(part.full and (part.index == 0).all() for _, part in selection.each())


@pytest.mark.parametrize(
    ("rows", "alike"),
    [
        ([{"a": 0.5, "b": 2.0}], True),
        ([{"a": 0.5, "b": 2.0}, None, {"a": 1.0, "b": 1.0}], True),
        ([{"a": 0.5, "b": 2.0}, "a", None], False),
        (["a", "b", "a"], False),
        ("b", True),
    ],
)
def test_it_is_known_whether_all_rows_have_the_same_adapters(rows: str | list[Row], alike: bool) -> None:
    selection = make_route(rows, None, KNOWN).select(("slot1", "slot0"), torch.zeros(3, 1))
    assert selection is not None
    assert selection.alike is alike
    assert (selection.routing.alike, selection.own_routing.alike) == (alike, alike)
    assert bool((selection.index == selection.index[0]).all()) is alike
