"""Push and pull between hubs in folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graftory.adapter import Parent
from graftory.errors import (
    AdapterNotFoundError,
    CorruptAdapterError,
    InvalidNameError,
    RemoteError,
    VersionConflictError,
)
from graftory.hub import Hub
from graftory.hub.records import FileEntry, digest_of, record_from_bytes
from graftory.hub.store import BlobStore
from tests.hub_samples import bottleneck, lora, same, snapshot


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub.create(tmp_path / "hub")


@pytest.fixture
def other(tmp_path: Path) -> Hub:
    return Hub.create(tmp_path / "other hub")


def address(hub: Hub, ref: str = "") -> str:
    return hub.root.as_uri() + (f"/{ref}" if ref else "")


@pytest.mark.parametrize("ref", ["trec", "trec@2", "trec:prod", "digest"])
def test_push_and_pull_keep_version_bytes_and_record(ref: str, hub: Hub, tmp_path: Path) -> None:
    hub.put("org/trec", lora(seed=9))
    hub.put("org/trec", lora())
    hub.set_alias("org/trec", "prod", 2)
    record = hub.record("org/trec@2")
    asked = f"org/trec@{record.digest}" if ref == "digest" else f"org/{ref}"
    remote = tmp_path / "new" / "remote"
    assert str(hub.push(asked, remote.as_uri()).ref) == "org/trec@2"
    third = Hub.create(tmp_path / "third")
    assert str(third.pull(address(Hub.open(remote), "org/trec@2")).ref) == "org/trec@2"
    assert third.record("org/trec") == record
    assert third.versions("org/trec") == (2,)
    assert same(third.get("org/trec@2"), lora())
    path = ".hub/records/org/trec/2.json"
    assert (third.root / path).read_bytes() == (hub.root / path).read_bytes()


def test_pull_by_name_alias_and_digest(hub: Hub, other: Hub) -> None:
    hub.put("trec", lora())
    hub.put("trec", lora(seed=1))
    hub.set_alias("trec", "prod", 1)
    assert str(other.pull(address(hub, "trec")).ref) == "trec@2"
    assert str(other.pull(address(hub, "trec:prod")).ref) == "trec@1"
    assert str(other.pull(address(hub, f"trec@{hub.record('trec@1').digest}")).ref) == "trec@1"


def test_the_second_time_is_a_no_op(hub: Hub, other: Hub) -> None:
    hub.put("trec", lora())
    hub.push("trec", address(other))
    before = snapshot(other.root)
    hub.push("trec", address(other))
    other.pull(address(hub, "trec"))
    assert snapshot(other.root) == before


def test_other_bytes_under_the_version_are_a_conflict_both_ways(hub: Hub, other: Hub) -> None:
    hub.put("trec", lora())
    other.put("trec", lora(seed=1))
    before = snapshot(hub.root), snapshot(other.root)
    with pytest.raises(VersionConflictError):
        hub.push("trec@1", address(other))
    with pytest.raises(VersionConflictError):
        hub.pull(address(other, "trec@1"))
    assert (snapshot(hub.root), snapshot(other.root)) == before


def test_parents_of_a_composition_travel_and_others_do_not(hub: Hub, other: Hub) -> None:
    hub.put("part", bottleneck())
    hub.put("seed", lora(seed=3))
    parents = (
        Parent("part@1", hub.record("part").digest, "composed"),
        Parent("seed@1", hub.record("seed").digest, "merged", 1.0),
    )
    hub.put("whole", lora(parents=parents))
    hub.push("whole", address(other))
    assert [row.name for row in other.index()] == ["part", "whole"]
    assert same(other.get("part"), bottleneck())


def test_a_parent_that_is_missing_is_named(hub: Hub, other: Hub) -> None:
    hub.put("whole", lora(parents=(Parent("part@1", "sha256:" + "0" * 64, "composed"),)))
    with pytest.raises(AdapterNotFoundError, match=r"composed of part@1"):
        hub.push("whole", address(other))
    assert other.index() == ()


@pytest.mark.parametrize("which", [0, 1])
def test_damage_at_the_source_is_not_pulled(which: int, hub: Hub, other: Hub) -> None:
    other.put("trec", lora())
    path = sorted(path for path in (other.root / ".hub/blobs").rglob("*") if path.is_file())[which]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = snapshot(hub.root)
    with pytest.raises(CorruptAdapterError, match="trec@1"):
        hub.pull(address(other, "trec"))
    assert snapshot(hub.root) == before


def forge(hub: Hub, **changes: object) -> None:
    """Change the record of trec@1 and give it the digest that fits."""
    path = hub.root / ".hub/records/trec/1.json"
    fields = json.loads(path.read_text()) | changes
    spec = record_from_bytes(path.read_bytes(), "x").spec
    fields["digest"] = digest_of(tuple(FileEntry(**entry) for entry in fields["files"]), spec)
    path.write_text(json.dumps(fields))


def test_a_forged_list_of_tensors_is_refused(hub: Hub, other: Hub) -> None:
    other.put("trec", lora())
    forge(other, tensors=[])
    with pytest.raises(CorruptAdapterError, match="other tensors"):
        hub.pull(address(other, "trec"))
    assert hub.index() == ()


def test_forged_file_names_are_refused(hub: Hub, other: Hub) -> None:
    other.put("trec", lora())
    entries = json.loads((other.root / ".hub/records/trec/1.json").read_text())["files"]
    forge(other, files=[entries[0] | {"path": "../../evil"}, entries[1]])
    with pytest.raises(CorruptAdapterError, match="other files"):
        hub.pull(address(other, "trec"))


def test_forged_contents_with_right_hashes_are_refused(hub: Hub, other: Hub) -> None:
    """Every hash fits, but the weights are another adapter's than the specification says."""
    other.put("trec", lora())
    other.put("part", bottleneck())
    blobs = BlobStore(other.root / ".hub")
    data = blobs.map(other.record("part").files[0].sha256, "x")
    entries = json.loads((other.root / ".hub/records/trec/1.json").read_text())["files"]
    forge(other, files=[entries[0], entries[1] | {"sha256": blobs.write(bytes(data)), "size": len(data)}])
    before = snapshot(hub.root)
    with pytest.raises((CorruptAdapterError, NotImplementedError)):
        hub.pull(address(other, "trec"))
    assert snapshot(hub.root) == before


def test_a_broken_transfer_goes_on_where_it_stopped(hub: Hub, other: Hub) -> None:
    hub.put("trec", lora())

    def stop(what: str, done: int, total: int) -> None:
        if what.endswith("safetensors"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        other.pull(address(hub, "trec"), progress=stop)
    assert other.index() == ()
    travelled: list[str] = []
    other.pull(address(hub, "trec"), progress=lambda what, done, total: travelled.append(what))
    assert travelled == []  # the break came after the last byte: nothing needs to travel again
    assert same(other.get("trec"), lora())


def test_progress_names_every_file_and_ends_at_its_size(hub: Hub, other: Hub) -> None:
    hub.put("trec", lora())
    calls: list[tuple[str, int, int]] = []
    hub.push("trec", address(other), progress=lambda *call: calls.append(call))
    assert calls == [(f"trec@1 {entry.path}", entry.size, entry.size) for entry in hub.record("trec").files]


@pytest.mark.parametrize(
    ("remote", "text"),
    [
        ("/plain/path", "not a remote"),
        ("ftp://host/dir", "file://"),
        ("file://host/dir", "wanted file:///"),
        ("x", "remote"),
    ],
)
def test_what_is_not_a_remote(remote: str, text: str, hub: Hub) -> None:
    hub.put("trec", lora())
    with pytest.raises(RemoteError, match=text):
        hub.push("trec", remote)
    with pytest.raises(RemoteError, match=text):
        hub.pull(remote)


def test_push_does_not_make_a_hub_of_any_folder(hub: Hub, tmp_path: Path) -> None:
    hub.put("trec", lora())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(RemoteError, match="is not a hub"):
        hub.push("trec", (tmp_path / "photos").as_uri())
    with pytest.raises(RemoteError, match="lies inside the hub"):
        hub.push("trec", (hub.root / "trec").as_uri())
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]


def test_pull_of_what_is_not_there(hub: Hub, other: Hub, tmp_path: Path) -> None:
    other.put("trec", lora())
    with pytest.raises(AdapterNotFoundError, match="did you mean trec"):
        hub.pull(address(other, "trek"))
    with pytest.raises(InvalidNameError):
        hub.pull(address(other, "A!"))
    with pytest.raises(RemoteError, match="no hub on this path"):
        hub.pull((tmp_path / "nothing" / "trec").as_uri())


def test_the_longest_part_that_is_a_hub_is_the_remote(hub: Hub, other: Hub) -> None:
    """A hub inside another hub's folder is the one that is meant."""
    inner = Hub.create(other.root / "org")
    inner.put("trec", lora(seed=1))
    other.put("org/trec", lora())
    assert str(hub.pull(address(other, "org/trec")).ref) == "trec@1"
    assert same(hub.get("trec"), lora(seed=1))
