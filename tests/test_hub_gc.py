"""`Hub.gc`: it removes what nobody needs, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from graftory.cli import cli
from graftory.errors import CorruptAdapterError
from graftory.hub import Hub
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


def test_the_command(hub: Hub) -> None:
    litter(hub)
    said = CliRunner().invoke(cli, ["--registry", str(hub.root), "gc", "--dry-run", "--all"]).output
    assert "would free 33 bytes in 4 files" in said
    assert "unfinished download" in said
    said = CliRunner().invoke(cli, ["--registry", str(hub.root), "gc", "--json"]).output
    assert json.loads(said)["freed"] == 22
