"""`Hub.gc`: it removes what nobody needs, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from graftory.adapter import AdapterRef
from graftory.cli import cli
from graftory.errors import CorruptAdapterError
from graftory.hub import Hub, gc
from graftory.hub.depot import Depot
from tests.hub_samples import bottleneck, lora, same


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    hub = Hub.create(tmp_path / "hub")
    hub.put("a", lora(0))
    hub.put("b", bottleneck())
    return hub


def tree(hub: Hub) -> dict[str, bytes | None]:
    """Every file and folder of a hub but its lock."""
    return {
        path.relative_to(hub.root).as_posix(): path.read_bytes() if path.is_file() else None
        for path in hub.root.rglob("*")
        if path.name != "lock"
    }


def litter(hub: Hub) -> Depot:
    """One of everything that a crash or a broken download can leave."""
    depot = Depot(hub.root)
    depot.blobs.write(b"nobody's")
    (depot.tmp / "0123").write_bytes(b"half a recor")
    depot.staging.home.mkdir(parents=True)
    depot.staging.path("e" * 64).write_bytes(b"half a file")
    (depot.staging.home / ("f" * 64 + ".lock")).write_bytes(b"")
    depot.signatures.add("a", 7, "ab" * 16, b"{}")
    return depot


def test_a_sound_hub_loses_nothing(hub: Hub) -> None:
    before = tree(hub)
    assert hub.gc().removed == ()
    assert tree(hub) == before


def test_leftovers_go_and_nothing_else(hub: Hub) -> None:
    before = tree(hub)
    litter(hub)
    found = hub.gc(partial_downloads=True)
    assert sorted(item.why for item in found.removed) == [
        "no version needs it",
        "signature of a version that is not here",
        "temporary file of a broken write",
        "unfinished download",
    ]
    assert found.freed == sum(map(len, (b"nobody's", b"half a recor", b"half a file", b"{}")))
    after = tree(hub)
    assert {path for path, data in after.items() if data is not None} == {
        path for path, data in before.items() if data is not None
    }
    assert hub.gc(partial_downloads=True).removed == ()
    assert same(hub.get("a"), lora(0))
    assert hub.verify().ok


def test_a_dry_run_removes_nothing(hub: Hub) -> None:
    litter(hub)
    before = tree(hub)
    would = hub.gc(dry_run=True, partial_downloads=True)
    assert tree(hub) == {path: data for path, data in before.items() if not path.endswith(".lock")}
    assert {item.path for item in would.removed} == {item.path for item in hub.gc(partial_downloads=True).removed}


def test_a_young_download_is_kept_for_the_next_pull(hub: Hub) -> None:
    depot = litter(hub)
    path = depot.staging.path("e" * 64)
    hub.gc()
    assert path.exists()
    os.utime(path, (0, 0))
    hub.gc()
    assert not path.exists()


def test_a_download_that_somebody_is_at_is_kept(hub: Hub) -> None:
    depot = litter(hub)
    path = depot.staging.path("e" * 64)
    script = (
        "import sys; from pathlib import Path; from graftory.hub.staging import Staging\n"
        f"with Staging(Path({str(depot.folder)!r})).hold(['{'e' * 64}']):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        hub.gc(partial_downloads=True)
        assert path.exists()
        other.communicate(b"")
    hub.gc(partial_downloads=True)
    assert not path.exists()


def test_a_damaged_record_stops_it(hub: Hub) -> None:
    litter(hub)
    (hub.root / ".hub" / "records" / "a" / "1.json").write_bytes(b"{}")
    before = tree(hub)
    with pytest.raises(CorruptAdapterError, match="none was removed: see hub verify"):
        hub.gc(partial_downloads=True)
    assert tree(hub) == before


def test_it_mends_what_a_broken_off_writer_left(hub: Hub) -> None:
    index = hub.root / "registry.json"
    right = index.read_bytes()
    (hub.root / ".hub" / "pending").write_bytes(b'["a"]\n')
    index.write_bytes(right.replace(b'"version": 1', b'"version": 4', 1))
    hub.gc()
    assert index.read_bytes() == right
    assert not (hub.root / ".hub" / "pending").exists()


def test_a_note_of_another_name_outlives_a_no_op(hub: Hub) -> None:
    """Somebody was broken off after a record of b; what others do next must not hide it."""
    index = hub.root / "registry.json"
    old = index.read_bytes()
    hub.put("b", bottleneck(1))
    index.write_bytes(old)
    (hub.root / ".hub" / "pending").write_bytes(b'["b"]\n')
    hub.put("a", lora(0))
    assert [row.version for row in hub.index()] == [1, 2]
    assert hub.verify().ok


def test_the_command(hub: Hub) -> None:
    litter(hub)
    said = CliRunner().invoke(cli, ["--registry", str(hub.root), "gc", "--dry-run", "--all"]).output
    assert "would free 33 bytes in 4 files" in said
    assert "unfinished download" in said
    said = CliRunner().invoke(cli, ["--registry", str(hub.root), "gc", "--json"]).output
    assert json.loads(said)["freed"] == 22


def test_a_record_put_aside_keeps_its_blobs(hub: Hub) -> None:
    record = Depot(hub.root).records.path("a", 1)
    aside = record.with_name("1.json.bak")
    record.rename(aside)
    hub.gc()
    aside.rename(record)
    hub.rebuild_index()
    assert same(hub.get("a@1"), lora(0))
    assert hub.verify().ok


def test_files_that_are_none_of_a_hub_stay(hub: Hub) -> None:
    for name in ("signatures/x.json", "signatures/a/99999999999/ab.json", "blobs/sha256/README", "notes.txt"):
        path = hub.root / ".hub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    before = tree(hub)
    assert hub.gc(partial_downloads=True).removed == ()
    assert tree(hub) == before


def test_empty_folders_go(hub: Hub) -> None:
    for name in ("records/org/gone", "signatures/a/1", "aliases/org", "blobs/sha256/zz"):
        (hub.root / ".hub" / name).mkdir(parents=True)
    hub.gc()
    left = {path.relative_to(hub.root / ".hub").as_posix() for path in (hub.root / ".hub").rglob("*") if path.is_dir()}
    assert not left & {"records/org", "signatures/a", "aliases/org", "blobs/sha256/zz"}
    assert "records/a" in left
    hub.put("org/gone", lora(2))
    hub.set_alias("org/gone", "prod", 1)
    assert hub.verify().ok


def test_a_damaged_alias_log_hinders_nothing(hub: Hub) -> None:
    litter(hub)
    (hub.root / ".hub" / "pending").write_bytes(b'["a"]\n')
    (hub.root / ".hub" / "aliases").mkdir()
    (hub.root / ".hub" / "aliases" / "a.jsonl").write_bytes(b"{")
    assert len(hub.gc(partial_downloads=True).removed) == 4
    assert (hub.root / ".hub" / "pending").exists()


def test_a_blob_that_a_pull_counted_on_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    """A leftover of a crash looks to a pull like a file that need not travel; then gc takes it away."""
    here = Hub.create(tmp_path / "here")
    config = hub.record("a").files[0]
    Depot(here.root).blobs.write(Depot(hub.root).blobs.path(config.sha256).read_bytes())
    collected: list[str] = []

    def progress(*_: object) -> None:
        collected.extend(item.path for item in here.gc(partial_downloads=True).removed)

    here.pull(f"{hub.root.as_uri()}/a", progress=progress)
    assert [Path(path).name for path in collected] == [config.sha256]
    assert same(here.get("a"), lora(0))
    assert here.verify().ok


def test_a_version_that_came_while_records_were_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most records are read before the lock is taken; those that came since are read under it."""
    real = gc.read_needs

    def read_needs(depot: Depot, known: gc.Needs | None = None) -> dict[AdapterRef, frozenset[str]]:
        needs = real(depot, known)
        if known is None:
            hub.put("late", lora(8))
        return needs

    monkeypatch.setattr(gc, "read_needs", read_needs)
    assert hub.gc().removed == ()
    assert same(hub.get("late"), lora(8))


def test_a_download_that_ends_while_it_is_looked_at(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transfer that found its bytes wrong throws them away at any moment, without the hub's lock."""
    depot = litter(hub)
    path = depot.staging.path("e" * 64)
    os.utime(path, (0, 0))
    real = gc._age

    def age(path: Path) -> float:
        seconds = real(path)
        path.unlink(missing_ok=True)
        return seconds

    monkeypatch.setattr(gc, "_age", age)
    assert "unfinished download" not in {item.why for item in hub.gc().removed}
    monkeypatch.undo()
    assert gc._age(path) == float("inf")
