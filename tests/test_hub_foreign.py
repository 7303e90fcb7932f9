"""Adapters without a record, from a remote that has nothing but PEFT's two files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from graftory.errors import CorruptAdapterError
from graftory.hub import Hub
from graftory.hub.depot import Depot
from graftory.hub.files import copy_on
from graftory.hub.foreign import SOURCE, outline, take_in
from graftory.hub.records import FileEntry, Record
from graftory.hub.remotes.base import Foreign
from tests.hub_samples import lora, same


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


@dataclass(frozen=True)
class Shelf:
    """A remote with one adapter's files; counts what is read of them."""

    folder: Path
    read: list[int]

    def peek(self, item: Record | Foreign, entry: FileEntry, length: int) -> bytes:
        self.read.append(length)
        return (self.folder / entry.path).read_bytes()[:length]

    def fetch(self, item: Record | Foreign, entry: FileEntry, target: Path, progress: Callable[[int], None]) -> None:
        self.read.append(entry.size)
        copy_on(self.folder / entry.path, target, progress)

    def item(self) -> Foreign:
        files = sorted(path for path in self.folder.iterdir() if path.name != "graftory.json")
        entries = (FileEntry(p.name, hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_size) for p in files)
        return Foreign("trec", tuple(entries), "hf://me/Trec@abc", "mit")


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    maker = Hub.create(tmp_path / "maker")
    maker.put("trec", lora())
    return Shelf(maker.materialize("trec", tmp_path / "shelf"), [])


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub.create(tmp_path / "hub")


def test_the_files_stay_as_they_are_and_the_record_says_where_they_were_found(hub: Hub, shelf: Shelf) -> None:
    ref = take_in(Depot(hub.root), shelf, shelf.item(), name=None, allow_nonfinite=False, progress=silent)  # type: ignore[arg-type]
    record = hub.record(ref)
    assert str(ref) == "trec@1"
    assert record.files == shelf.item().files
    assert record.spec.lineage.process == "import"
    assert record.spec.lineage.parameters[SOURCE] == "hf://me/Trec@abc"
    assert record.spec.licence == "mit"
    assert same(replace(hub.get(ref), spec=lora().spec), lora())
    again = take_in(Depot(hub.root), shelf, shelf.item(), name=None, allow_nonfinite=False, progress=silent)  # type: ignore[arg-type]
    assert again == ref
    assert not [path for path in (hub.root / ".hub/tmp").rglob("*") if path.is_file()]


def test_bytes_other_than_promised_are_not_kept(hub: Hub, shelf: Shelf) -> None:
    item = shelf.item()
    weights = shelf.folder / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CorruptAdapterError, match="not those that were promised"):
        take_in(Depot(hub.root), shelf, item, name="x", allow_nonfinite=False, progress=silent)  # type: ignore[arg-type]
    assert hub.index() == ()
    assert not [path for path in (hub.root / ".hub").rglob("*") if path.is_file() and path.parent.name == "partial"]


def test_the_outline_needs_the_headers_alone(shelf: Shelf) -> None:
    item = shelf.item()
    spec, tensors = outline(shelf, item)  # type: ignore[arg-type]
    assert {tensor.name: tensor.shape for tensor in tensors} == {
        key: tuple(value.shape) for key, value in lora().tensors.items()
    }
    assert spec.base.id == "org/base"
    weights = next(entry for entry in item.files if entry.path.endswith(".safetensors"))
    assert sum(shelf.read) < item.size - sum(value.numel() * 4 for value in lora().tensors.values()) + 64
    assert weights.size not in shelf.read
