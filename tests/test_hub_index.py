"""The index: a line for each name, changed one at a time."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from graftory.hub.index import IndexRow, index_bytes, read_index, with_row


def row(name: str, version: int = 1) -> IndexRow:
    return IndexRow(name, version, "sha256:" + "0" * 64, {"prod": 1}, "tä\nsk", "classification", "lora", 'a", "b')


def test_a_row_at_a_time_gives_the_same_bytes_as_all_at_once() -> None:
    draw = random.Random(0)
    rows: dict[str, IndexRow] = {}
    data: bytes | None = index_bytes(())
    for _ in range(300):
        name = draw.choice(["a", "a-b", "a.b", "ab", "b", "org/a", "org-x/a", "org/b"])
        rows.pop(name, None)
        if draw.random() < 0.7:
            rows[name] = row(name, draw.randint(1, 99))
        assert data is not None
        data = with_row(data, name, rows.get(name))
        assert data == index_bytes(tuple(rows.values()))


def test_it_is_json_that_reads_back(tmp_path: Path) -> None:
    rows = (row("a", 3), row("org/a"))
    path = tmp_path / "registry.json"
    path.write_bytes(index_bytes(rows))
    assert [item["name"] for item in json.loads(path.read_bytes())["adapters"]] == ["a", "org/a"]
    assert read_index(path) == rows
    assert len(path.read_bytes().splitlines()) == 4


@pytest.mark.parametrize("edit", [lambda d: d.replace(b'{"name"', b'{ "name"', 1), lambda d: d[:-1], lambda d: b""])
def test_what_was_edited_by_hand_is_not_spliced(edit: object) -> None:
    assert callable(edit)
    assert with_row(edit(index_bytes((row("a"),))), "b", row("b")) is None
