"""The hub's promises, through its public face."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graftory.adapter import Adapter, AdapterRef, Metric, Parent
from graftory.errors import (
    AdapterNotFoundError,
    ConfigError,
    CorruptAdapterError,
    DataError,
    GraftoryError,
    InvalidNameError,
    VersionConflictError,
)
from graftory.hub import Hub, depot, files
from tests.hub_samples import bottleneck, lora, same, snapshot


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub.create(tmp_path / "hub")


def test_put_and_get_round_trip(hub: Hub) -> None:
    assert str(hub.put("org/trec", lora())) == "org/trec@1"
    assert same(hub.get("org/trec@1"), lora())


def test_the_record_tells_what_the_files_hold(hub: Hub) -> None:
    record = hub.record(hub.put("trec", lora()))
    assert record.spec == lora().spec
    assert [entry.path for entry in record.files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert {entry.name: entry.shape for entry in record.tensors} == {
        key: tuple(value.shape) for key, value in lora().tensors.items()
    }
    assert {entry.dtype for entry in record.tensors} == {"F32"}


def test_same_adapter_is_kept_once(hub: Hub) -> None:
    first = hub.put("trec", lora())
    hub.put("trec", lora(seed=1))
    before = snapshot(hub.root)
    assert hub.put("trec", lora()) == first
    assert hub.put("trec", lora(), version=1) == first
    assert hub.versions("trec") == (1, 2)
    assert snapshot(hub.root) == before


def test_a_version_never_changes(hub: Hub) -> None:
    hub.put("trec", lora(), version=5)
    before = snapshot(hub.root)
    with pytest.raises(VersionConflictError, match="trec@5 exists"):
        hub.put("trec", lora(seed=1), version=5)
    assert snapshot(hub.root) == before
    assert str(hub.put("trec", lora(seed=1))) == "trec@6"


def test_four_forms_of_a_reference(hub: Hub) -> None:
    hub.put("trec", lora())
    hub.put("trec", lora(seed=1))
    hub.set_alias("trec", "prod", 1)
    digest = hub.record("trec@1").digest
    found = {ref: str(hub.resolve(ref)) for ref in ("trec", "trec@1", f"trec@{digest}", "trec:prod")}
    assert found == {"trec": "trec@2", "trec@1": "trec@1", f"trec@{digest}": "trec@1", "trec:prod": "trec@1"}
    assert hub.resolve(AdapterRef("trec", alias="prod")) == AdapterRef("trec", version=1)


@pytest.mark.parametrize(
    ("ref", "text"),
    [
        ("tre", "did you mean trec"),
        ("qqqqqqqq", "it has trec"),
        ("trec@7", "versions 1"),
        ("trec:prod", "aliases: none"),
        ("trec@sha256:" + "0" * 64, "versions 1"),
    ],
)
def test_what_is_not_there_is_named(ref: str, text: str, hub: Hub) -> None:
    hub.put("trec", lora())
    with pytest.raises(AdapterNotFoundError, match=text):
        hub.get(ref)


def test_versions_of_a_missing_name(hub: Hub) -> None:
    with pytest.raises(AdapterNotFoundError, match="it is empty"):
        hub.versions("trec")


@pytest.mark.parametrize("name", ["../x", "a/b/c", "UP", "con", "a.json", "x.jsonl/y", ""])
def test_names_that_could_be_paths_are_refused(name: str, hub: Hub) -> None:
    with pytest.raises(InvalidNameError):
        hub.put(name, lora())
    assert hub.index() == ()


def test_aliases_move_and_their_log_grows(hub: Hub) -> None:
    hub.put("trec", lora())
    hub.put("trec", lora(seed=1))
    for version in (1, 2, 2):
        hub.set_alias("trec", "prod", version)
    hub.set_alias("trec", "best", 1)
    assert hub.aliases("trec") == {"best": 1, "prod": 2}
    assert hub.index()[0].aliases == {"best": 1, "prod": 2}
    lines = (hub.root / ".hub/aliases/trec.jsonl").read_text().splitlines()
    assert [(json.loads(line)["alias"], json.loads(line)["version"]) for line in lines] == [
        ("prod", 1),
        ("prod", 2),
        ("best", 1),
    ]


@pytest.mark.parametrize(
    ("alias", "version", "error"), [("prod", 9, AdapterNotFoundError), ("P!", 1, InvalidNameError)]
)
def test_impossible_alias(alias: str, version: int, error: type[GraftoryError], hub: Hub) -> None:
    hub.put("trec", lora())
    before = snapshot(hub.root)
    with pytest.raises(error):
        hub.set_alias("trec", alias, version)
    assert snapshot(hub.root) == before


def test_index_has_a_row_for_each_name_and_is_rebuilt_byte_for_byte(hub: Hub) -> None:
    for name in ("zeta", "alpha", "org/alpha"):
        hub.put(name, lora())
        hub.put(name, bottleneck())
    hub.set_alias("alpha", "prod", 1)
    rows = hub.index()
    assert [(row.name, row.version, row.method, row.base) for row in rows] == [
        (name, 2, "bottleneck", "org/base") for name in ("alpha", "org/alpha", "zeta")
    ]
    path = hub.root / "registry.json"
    before = path.read_bytes()
    path.unlink()
    assert hub.index() == rows
    hub.rebuild_index()
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"format": "graftory-registry", "schema": 1, "adapters": [1]}'])
def test_a_damaged_index_is_named_and_can_be_made_anew(damage: bytes, hub: Hub) -> None:
    hub.put("trec", lora())
    path = hub.root / "registry.json"
    before = path.read_bytes()
    path.write_bytes(damage)
    with pytest.raises(CorruptAdapterError, match=r"registry\.json"):
        hub.index()
    hub.rebuild_index()
    assert path.read_bytes() == before


def test_a_row_lost_in_a_crash_comes_back_with_the_next_put(hub: Hub) -> None:
    empty = (hub.root / "registry.json").read_bytes()
    hub.put("trec", lora())
    full = (hub.root / "registry.json").read_bytes()
    (hub.root / "registry.json").write_bytes(empty)
    hub.put("trec", lora())
    assert (hub.root / "registry.json").read_bytes() == full


def test_blobs_come_before_the_record_and_the_index_last(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_create, real_write = files.create_exclusive, files.write_atomic

    def create(path: Path, data: bytes, scratch: Path) -> None:
        order.append("record")
        real_create(path, data, scratch)

    def write(path: Path, data: bytes, scratch: Path) -> None:
        order.append({"registry.json": "index", "pending": "pending"}.get(path.name, "blob"))
        real_write(path, data, scratch)

    monkeypatch.setattr("graftory.hub.records.create_exclusive", create)
    monkeypatch.setattr("graftory.hub.store.write_atomic", write)
    monkeypatch.setattr("graftory.hub.depot.write_atomic", write)
    monkeypatch.setattr("graftory.hub.pending.write_atomic", write)
    hub.put("trec", lora())
    assert order == ["blob", "blob", "pending", "record", "index"]


def break_write(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk be full at the n-th write from now on."""
    real_temporary, count = files._temporary, iter(range(1, 100))

    def failing(data: bytes, scratch: Path) -> object:
        if next(count) == number:
            raise OSError(28, "No space left on device")
        return real_temporary(data, scratch)

    monkeypatch.setattr(files, "_temporary", failing)


@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_an_error_up_to_the_record_leaves_nothing(write: int, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(hub.root)
    with monkeypatch.context() as patch:
        break_write(write, patch)
        with pytest.raises(OSError, match="No space"):
            hub.put("trec", lora())
    assert snapshot(hub.root) == before
    assert str(hub.put("trec", lora())) == "trec@1"


def test_a_full_disk_after_the_record_takes_nothing_back(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is there for good; its row is made anew on every look until it can be written."""
    before = (hub.root / "registry.json").read_bytes()
    with monkeypatch.context() as patch:
        break_write(5, patch)
        assert str(hub.put("trec", lora())) == "trec@1"
    assert (hub.root / "registry.json").read_bytes() == before
    assert [row.name for row in hub.index()] == ["trec"]
    assert same(hub.get("trec@1"), lora())
    assert str(hub.put("trec", lora())) == "trec@1"
    assert (hub.root / "registry.json").read_bytes() != before
    assert not (hub.root / ".hub/pending").exists()


def blobs(hub: Hub) -> list[Path]:
    return sorted(path for path in (hub.root / ".hub/blobs").rglob("*") if path.is_file())


@pytest.mark.parametrize("which", [0, 1])
def test_a_flipped_byte_is_never_exposed(which: int, hub: Hub, tmp_path: Path) -> None:
    hub.put("trec", lora())
    path = blobs(hub)[which]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(CorruptAdapterError, match="trec@1"):
        hub.get("trec")
    with pytest.raises(CorruptAdapterError, match="trec@1"):
        hub.materialize("trec", tmp_path / "out")
    assert not (tmp_path / "out").exists()


Edit = Callable[[dict[str, object]], object]


@pytest.mark.parametrize(
    "edit",
    [
        lambda r: r.update(digest="sha256:" + "0" * 64),
        lambda r: r["spec"]["config"].update(alpha=99.0),
        lambda r: r["files"][0].update(sha256="0" * 64),
        lambda r: r.update(version=2),
        lambda r: r.update(name="other"),
        lambda r: r.update(extra=1),
        lambda r: r.pop("created"),
        lambda r: r.update(schema=2),
    ],
)
def test_a_changed_record_is_seen(edit: Edit, hub: Hub) -> None:
    hub.put("trec", lora())
    path = hub.root / ".hub/records/trec/1.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    with pytest.raises(CorruptAdapterError, match=r"1\.json"):
        hub.record("trec@1")


def test_digest_depends_on_bytes_and_specification_only(hub: Hub) -> None:
    hub.put("a", lora())
    hub.put("b", lora())
    hub.put("c", lora(seed=1))
    relicensed = Adapter(replace(lora().spec, licence="apache-2.0"), lora().tensors)
    hub.put("d", relicensed)
    a, b, c, d = (hub.record(name).digest for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


def test_a_number_that_json_cannot_hold_is_refused(hub: Hub) -> None:
    metric = Metric("loss", float("nan"), "trec", "test", 1)
    with pytest.raises(ConfigError, match="specification"):
        hub.put("trec", Adapter(replace(lora().spec, metrics=(metric,)), lora().tensors))
    assert hub.index() == ()


def test_tensors_that_share_memory_are_kept(hub: Hub) -> None:
    adapter = lora()
    whole = torch.randn(5, 8)
    tensors = {**adapter.tensors, "m.0.q.lora_B.weight": whole[:, ::4], "classifier.weight": whole[:3, :4]}
    assert same(hub.get(hub.put("trec", Adapter(adapter.spec, tensors))), Adapter(adapter.spec, tensors))


def test_materialize_is_all_or_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.put("trec", lora())
    out = tmp_path / "deep" / "out"
    assert hub.materialize("trec", out) == out
    first = snapshot(out)
    hub.materialize("trec", out)
    assert snapshot(out) == first
    (out / "note.txt").write_text("mine")
    with pytest.raises(VersionConflictError, match="holds other files"):
        hub.materialize("trec", out)
    assert (out / "note.txt").read_text() == "mine"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_adding_a_materialized_folder_is_a_no_op(hub: Hub, tmp_path: Path) -> None:
    ref = hub.put("trec", lora())
    assert hub.add(hub.materialize(ref, tmp_path / "out"), name="trec") == ref
    assert hub.versions("trec") == (1,)


def test_adding_what_is_no_adapter(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        hub.add(tmp_path / "missing", name="a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorruptAdapterError, match="no adapter here"):
        hub.add(tmp_path / "empty", name="a")


def test_lineage_follows_parents_by_digest(hub: Hub) -> None:
    hub.put("a", lora())
    digest = hub.record("a").digest
    merged = (Parent("elsewhere@4", digest, "merged", 0.5), Parent("gone@1", "sha256:" + "1" * 64, "merged", 0.5))
    hub.put("b", lora(seed=1, parents=merged))
    hub.put("c", lora(seed=2, parents=(Parent("b@1", hub.record("b").digest, "continued"),)))
    graph = hub.lineage("c")
    edges = {
        (graph.nodes[u]["ref"], graph.nodes[v]["ref"], data["relation"], data["weight"])
        for u, v, data in graph.edges(data=True)
    }
    assert edges == {
        ("a@1", "b@1", "merged", 0.5),
        ("gone@1", "b@1", "merged", 0.5),
        ("b@1", "c@1", "continued", None),
    }
    assert [graph.nodes[node]["ref"] for node in graph if not graph.nodes[node]["known"]] == ["gone@1"]


RACER = """
import sys, time
from pathlib import Path
from graftory.errors import VersionConflictError
from graftory.hub import Hub
root, seed, version = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(root / f"ready{seed}").touch()
while not (root / "go").exists():
    time.sleep(0.001)
try:
    print(Hub.open(root / "hub").add(root / f"adapter{seed}", name="trec", version=version or None))
except VersionConflictError:
    print("conflict")
"""


def race(root: Path, version: int, racers: int) -> list[str]:
    """Several processes add different adapters at the same moment; what each of them printed."""
    processes = []
    for seed in range(racers):
        source = Hub.create(root / f"source{seed}")
        source.materialize(source.put("trec", lora(seed)), root / f"adapter{seed}")
        command = [sys.executable, "-c", RACER, str(root), str(seed), str(version)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    while not all((root / f"ready{seed}").exists() for seed in range(racers)):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.001)
    (root / "go").touch()
    return sorted(process.communicate(timeout=120)[0].strip() for process in processes)


def test_of_two_writers_of_one_version_exactly_one_wins(hub: Hub) -> None:
    assert race(hub.root.parent, 1, 2) == ["conflict", "trec@1"]
    assert hub.get("trec@1").tensors


def test_writers_that_leave_the_version_open_all_get_one(hub: Hub) -> None:
    assert race(hub.root.parent, 0, 3) == ["trec@1", "trec@2", "trec@3"]
    before = (hub.root / "registry.json").read_bytes()
    hub.rebuild_index()
    assert (hub.root / "registry.json").read_bytes() == before


def test_another_writer_s_lock_is_waited_for_and_then_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depot, "LOCK_SECONDS", 0.01)
    with depot.Depot(hub.root).lock(), pytest.raises(GraftoryError, match="holds the hub's lock"):
        Hub.open(hub.root).put("trec", lora())
    assert str(hub.put("trec", lora())) == "trec@1"


def test_a_hub_can_be_moved(hub: Hub, tmp_path: Path) -> None:
    hub.put("trec", lora())
    shutil.move(hub.root, tmp_path / "moved")
    assert same(Hub.open(tmp_path / "moved").get("trec"), lora())


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_brings_a_hub_back_byte_for_byte(hub: Hub) -> None:
    hub.put("trec", lora())

    def git(*arguments: str) -> str:
        command = ["git", "-c", "core.autocrlf=true", "-C", str(hub.root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    git("init", "-q")
    git("add", ".")
    listed = git("ls-files").splitlines()
    assert "registry.json" in listed
    assert not [path for path in listed if path.startswith(".hub/tmp") or path == ".hub/lock"]
    shutil.rmtree(hub.root / ".hub")
    git("checkout", "--", ".hub")
    assert same(hub.get("trec"), lora())


def test_listing_imports_neither_torch_nor_transformers(hub: Hub) -> None:
    hub.put("trec", lora())
    script = (
        "import sys; from graftory.hub import Hub; hub = Hub.open(sys.argv[1]); hub.index(); hub.record('trec');"
        "hub.versions('trec'); print(sorted({'torch', 'transformers', 'peft', 'numpy', 'networkx'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, str(hub.root)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
