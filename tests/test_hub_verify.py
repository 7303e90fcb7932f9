"""`Hub.verify`: each kind of damage, made in real bytes, is found and named, and ends nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from graftory.adapter import Parent
from graftory.cli import cli
from graftory.errors import AdapterNotFoundError
from graftory.hub import Hub
from graftory.hub.keys import create_key, load_private_key, load_public_key
from tests.hub_samples import bottleneck, lora


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    hub = Hub.create(tmp_path / "hub")
    hub.put("a", lora(0))
    hub.put("a", lora(1))
    hub.put("org/b", bottleneck())
    hub.set_alias("a", "prod", 1)
    return hub


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def weights_of(hub: Hub, ref: str) -> Path:
    (entry,) = (e for e in hub.record(ref).files if e.path.endswith(".safetensors"))
    return hub.root / ".hub" / "blobs" / "sha256" / entry.sha256[:2] / entry.sha256


def test_a_whole_hub_is_sound(hub: Hub) -> None:
    told: list[tuple[str, int, int]] = []
    report = hub.verify(progress=lambda *step: told.append(step))
    assert (report.ok, report.problems, report.leftovers) == (True, (), 0)
    assert report.versions == 3
    blobs = [path for path in (hub.root / ".hub" / "blobs").rglob("*") if path.is_file()]
    assert report.files == len(blobs)
    assert report.size == sum(path.stat().st_size for path in blobs) == told[-1][1] == told[-1][2]


def remove_blob(hub: Hub) -> None:
    weights_of(hub, "a@2").unlink()


def truncate_blob(hub: Hub) -> None:
    path = weights_of(hub, "a@2")
    path.write_bytes(path.read_bytes()[:-1])


def flip_blob(hub: Hub) -> None:
    flip(weights_of(hub, "a@2"), -1)


def flip_record(hub: Hub) -> None:
    path = hub.root / ".hub" / "records" / "a" / "2.json"
    path.write_bytes(path.read_bytes().replace(b'"learning_rate": 0.1', b'"learning_rate": 0.2'))


def move_record(hub: Hub) -> None:
    records = hub.root / ".hub" / "records" / "a"
    (records / "2.json").rename(records / "3.json")


def break_alias(hub: Hub) -> None:
    path = hub.root / ".hub" / "aliases" / "a.jsonl"
    path.write_bytes(path.read_bytes() + b'{"alias": "pr\n')


def dangling_alias(hub: Hub) -> None:
    path = hub.root / ".hub" / "aliases" / "a.jsonl"
    path.write_bytes(path.read_bytes() + b'{"alias":"next","at":"2026","version":9}\n')


def edit_index(hub: Hub) -> None:
    path = hub.root / "registry.json"
    path.write_bytes(path.read_bytes().replace(b'"version": 2', b'"version": 1'))


def lose_index(hub: Hub) -> None:
    (hub.root / "registry.json").unlink()


@pytest.mark.parametrize(
    ("damage", "ref", "where", "what"),
    [
        (remove_blob, "a@2", ".hub/blobs/sha256/", "is missing"),
        (truncate_blob, "a@2", ".hub/blobs/sha256/", "recorded is sha256:"),
        (flip_blob, "a@2", ".hub/blobs/sha256/", "recorded is sha256:"),
        (flip_record, "a@2", ".hub/records/a/2.json", "not what its digest says"),
        (move_record, "a@3", ".hub/records/a/3.json", "holds a@2"),
        (break_alias, None, ".hub/aliases/a.jsonl", "JSON"),
        (dangling_alias, None, ".hub/aliases/a.jsonl", "a@9"),
        (edit_index, None, "registry.json", "records and alias logs"),
        (lose_index, None, "registry.json", "records and alias logs"),
    ],
)
def test_damage_is_found(hub: Hub, damage: Callable[[Hub], None], ref: str | None, where: str, what: str) -> None:
    damage(hub)
    report = hub.verify()
    problem = report.problems[0]
    assert problem.ref == ref
    assert problem.where.startswith(where)
    assert what in problem.what
    assert problem.remedy
    assert "org/b@1" not in {each.ref for each in report.problems}, "the rest of the hub is sound"


def test_all_problems_are_found_at_once(hub: Hub) -> None:
    flip_blob(hub)
    break_alias(hub)
    (hub.root / ".hub" / "records" / "a" / "1.json").write_bytes(b"{")
    assert {problem.ref for problem in hub.verify().problems} == {"a@1", "a@2", None}


def test_a_rebuild_mends_the_index(hub: Hub) -> None:
    before = (hub.root / "registry.json").read_bytes()
    edit_index(hub)
    assert not hub.verify().ok
    hub.rebuild_index()
    assert (hub.root / "registry.json").read_bytes() == before
    assert hub.verify().ok


def test_only_what_is_asked_for(hub: Hub) -> None:
    flip_blob(hub)
    edit_index(hub)
    assert hub.verify(["a@1", "org/b"]).ok
    assert not hub.verify(["a"]).ok
    with pytest.raises(AdapterNotFoundError):
        hub.verify(["c"])


def test_a_blob_nobody_needs_is_a_leftover(hub: Hub) -> None:
    (hub.root / ".hub" / "records" / "a" / "2.json").unlink()
    hub.rebuild_index()
    report = hub.verify()
    assert report.ok
    assert report.leftovers == 1, "the configuration is needed by a@1 too"


def test_a_parent_that_a_composition_needs(hub: Hub) -> None:
    adapter = lora(5, parents=(Parent("gone@1", "sha256:" + "0" * 64, "composed"),))
    hub.put("c", adapter)
    (problem,) = hub.verify().problems
    assert problem.ref == "c@1"
    assert "gone@1" in problem.what
    merged = replace(adapter.spec.lineage, parents=(Parent("gone@1", "sha256:" + "0" * 64, "merged"),))
    hub.put("c", replace(adapter, spec=replace(adapter.spec, lineage=merged)))
    assert hub.verify(["c@2"]).ok, "what was merged is not needed any more"


def test_gaps_are_listed_when_asked_for(hub: Hub) -> None:
    gaps = hub.verify(complete=True).gaps
    assert gaps is not None
    assert set(gaps) == {"a@1", "a@2", "org/b@1"}
    assert any("tokenizer" in gap.field for gap in gaps["a@1"])
    assert hub.verify().gaps is None


def test_signatures_are_demanded(hub: Hub, tmp_path: Path) -> None:
    create_key(tmp_path / "key")
    public = load_public_key(tmp_path / "key.pub")
    hub.sign("a@1", load_private_key(tmp_path / "key"))
    report = hub.verify(keys=[public])
    assert report.signed == {"a@1": public.id}
    assert {problem.ref for problem in report.problems} == {"a@2", "org/b@1"}
    assert hub.signatures("a@1") == (public.id,)
    signature = next((hub.root / ".hub" / "signatures" / "a" / "1").iterdir())
    flip(signature, 40)
    assert not hub.verify(["a@1"], keys=[public]).ok


def test_a_broken_off_writer_is_no_problem(hub: Hub) -> None:
    (hub.root / ".hub" / "pending").write_bytes(b'["a"]\n')
    edit_index(hub)
    assert hub.verify().ok, "readers make the row of a anew"
    assert next(row for row in hub.index() if row.name == "a").version == 2


def run(hub: Hub, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["--registry", str(hub.root), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_the_command(hub: Hub) -> None:
    code, output = run(hub, "verify", "--complete")
    assert code == 0
    assert "nothing is wrong" in output
    assert "licence" in output
    flip_blob(hub)
    code, output = run(hub, "verify")
    assert code == 1
    assert "a@2" in output
    assert "pull it again" in output
    code, output = run(hub, "verify", "--json")
    found = json.loads(output)
    assert (code, found["ok"], found["report"]["problems"][0]["ref"]) == (1, False, "a@2")
    edit_index(hub)
    code, output = run(hub, "verify", "a@1", "--rebuild")
    assert code == 0
    assert run(hub, "list")[1].count("2") >= 1
