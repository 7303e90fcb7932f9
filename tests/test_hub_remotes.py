"""Push and pull between hubs in folders."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import pytest
import torch

from graftory.adapter import Parent
from graftory.errors import (
    AdapterNotFoundError,
    CorruptAdapterError,
    InvalidNameError,
    RemoteError,
    VersionConflictError,
)
from graftory.hub import Hub, contents, depot, records
from graftory.hub.keys import create_key, load_private_key
from graftory.hub.records import FileEntry, digest_of, record_from_bytes
from graftory.hub.signature_store import SignatureStore
from graftory.hub.staging import Staging
from graftory.hub.store import BlobStore
from graftory.schema import canonical
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


def test_aliases_and_signatures_travel_both_ways(hub: Hub, other: Hub, tmp_path: Path) -> None:
    hub.put("trec", lora())
    hub.put("trec", lora(seed=1))
    for alias, version in (("prod", 2), ("best", 2), ("old", 1)):
        hub.set_alias("trec", alias, version)
    SignatureStore(hub.root / ".hub").add("trec", 2, "ab" * 16, b"signed")
    pushed = hub.push("trec:prod", address(other))
    assert (pushed.aliases, pushed.kept, pushed.signatures) == (("best", "prod"), {}, ("ab" * 16,))
    assert other.aliases("trec") == {"best": 2, "prod": 2}
    third = Hub.create(tmp_path / "third")
    assert third.pull(address(other, "trec")).aliases == ("best", "prod")
    assert third.aliases("trec") == {"best": 2, "prod": 2}
    assert SignatureStore(third.root / ".hub").of("trec", 2) == {"ab" * 16: b"signed"}


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_a_signature_stays_behind_where_the_version_was_made_on_its_own(
    direction: str, hub: Hub, other: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same adapter, same digest, but another time in its record, which the signature is over."""
    hub.put("trec", lora())
    create_key(tmp_path / "key")
    hub.sign("trec", load_private_key(tmp_path / "key"))
    with monkeypatch.context() as later:
        later.setattr(records, "datetime", Later)
        other.put("trec", lora())
    assert hub.record("trec").digest == other.record("trec").digest
    assert hub.record("trec").created != other.record("trec").created
    delivery = hub.push("trec", address(other)) if direction == "push" else other.pull(address(hub, "trec"))
    assert delivery.signatures == ()
    assert other.signatures("trec") == ()
    assert other.verify().ok


class Later(datetime):
    """A clock that is ahead."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Later:
        return cls(2100, 1, 1, tzinfo=tz)


def test_an_alias_that_means_another_version_there_stays_unless_asked(hub: Hub, other: Hub) -> None:
    for seed in (0, 1):
        hub.put("trec", lora(seed=seed))
    other.put("trec", lora(seed=0))
    other.set_alias("trec", "prod", 1)
    hub.set_alias("trec", "prod", 2)
    first = hub.push("trec@2", address(other))
    assert (first.aliases, first.kept) == ((), {"prod": 1})
    assert other.aliases("trec") == {"prod": 1}
    assert hub.push("trec@2", address(other), move_aliases=True).aliases == ("prod",)
    assert other.aliases("trec") == {"prod": 2}


def test_a_transfer_cut_inside_a_file_goes_on_at_the_byte(
    hub: Hub, other: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("trec", lora())
    monkeypatch.setattr("graftory.hub.files._CHUNK", 64)

    def stop(what: str, done: int, total: int) -> None:
        if what.endswith("safetensors") and done >= 256:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        other.pull(address(hub, "trec"), progress=stop)
    seen: list[int] = []
    other.pull(address(hub, "trec"), progress=lambda what, done, total: seen.append(done))
    assert seen[0] == 256 + 64
    assert same(other.get("trec"), lora())
    assert not [path for path in (other.root / ".hub/tmp").rglob("*") if path.is_file()]


@pytest.mark.parametrize("junk", [b"x" * 100, b"x" * 100_000])
def test_a_damaged_beginning_is_fetched_anew(junk: bytes, hub: Hub, other: Hub) -> None:
    hub.put("trec", lora())
    weights = hub.record("trec").files[1]
    staging = Staging(other.root / ".hub")
    staging.home.mkdir(parents=True)
    staging.path(weights.sha256).write_bytes(junk)
    other.pull(address(hub, "trec"))
    assert same(other.get("trec"), lora())


def test_what_garbage_collection_took_between_check_and_lock_is_fetched_again(
    hub: Hub, other: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blob that no record names yet counts as here, until it is gone when the record is written."""
    hub.put("trec", lora())
    weights = hub.record("trec").files[1]
    blobs = BlobStore(other.root / ".hub")
    blobs.write(bytes(BlobStore(hub.root / ".hub").map(weights.sha256, "x")))
    real, calls = contents.check_contents, []

    def check(*args: Any, **options: Any) -> None:
        real(*args, **options)
        calls.append(1)
        if len(calls) == 1:
            blobs.remove(weights.sha256)

    monkeypatch.setattr(depot, "check_contents", check)
    other.pull(address(hub, "trec"))
    assert len(calls) == 2
    assert same(other.get("trec"), lora())


def test_weights_that_are_not_finite_travel_only_when_asked(hub: Hub, other: Hub) -> None:
    adapter = lora()
    adapter.tensors["classifier.bias"][0] = float("nan")
    with pytest.raises(CorruptAdapterError, match=r"classifier\.bias.*--allow-nonfinite"):
        hub.put("trec", adapter)
    assert hub.index() == ()
    hub.put("trec", adapter, allow_nonfinite=True)
    with pytest.raises(CorruptAdapterError, match="NaN or infinity"):
        other.pull(address(hub, "trec"))
    assert other.index() == ()
    other.pull(address(hub, "trec"), allow_nonfinite=True)
    assert torch.isnan(other.get("trec").tensors["classifier.bias"][0])


def test_listing_of_a_remote(hub: Hub, other: Hub) -> None:
    for seed in (0, 1):
        other.put("org/trec", lora(seed=seed))
    other.put("sms", lora())
    assert hub.listing(address(other)) == {"org/trec": (1, 2), "sms": (1,)}


def test_a_record_from_a_graftory_with_fewer_fields_keeps_its_bytes(hub: Hub, other: Hub) -> None:
    """Fields that came later have defaults; the digest is over what was written, the bytes travel as they are."""
    hub.put("trec", lora())
    path = hub.root / ".hub/records/trec/1.json"
    fields = json.loads(path.read_text())
    del fields["spec"]["base"]["revision"], fields["spec"]["task"]["template"]
    text = canonical({"files": fields["files"], "spec": fields["spec"]})
    fields["digest"] = f"sha256:{hashlib.sha256(text).hexdigest()}"
    path.write_text(json.dumps(fields))
    assert hub.record("trec").digest == fields["digest"]
    assert hub.record("trec").spec.base.revision is None
    other.pull(address(hub, "trec"))
    assert (other.root / ".hub/records/trec/1.json").read_bytes() == path.read_bytes()
