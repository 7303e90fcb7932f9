"""`Hub.verify`: each kind of damage, made in real bytes, is found and named, and ends nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
from click.testing import CliRunner

from graftory.adapter import Parent
from graftory.cli import cli
from graftory.errors import AdapterNotFoundError
from graftory.hub import Hub
from graftory.hub.depot import Depot
from graftory.hub.keys import create_key, load_private_key, load_public_key
from graftory.hub.records import Record
from tests.hub_samples import bottleneck, lora, same


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
    assert (report.ok, report.problems, report.leftovers) == (True, (), ())
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


def cut_alias(hub: Hub) -> None:
    """Without the end of its line the next move would be written into the last one."""
    path = hub.root / ".hub" / "aliases" / "a.jsonl"
    path.write_bytes(path.read_bytes()[:-1])


def dangling_alias(hub: Hub) -> None:
    path = hub.root / ".hub" / "aliases" / "a.jsonl"
    path.write_bytes(path.read_bytes() + b'{"alias":"next","at":"2026","version":9}\n')


def edit_index(hub: Hub) -> None:
    path = hub.root / "registry.json"
    path.write_bytes(path.read_bytes().replace(b'"version": 2', b'"version": 1'))


def lose_index(hub: Hub) -> None:
    (hub.root / "registry.json").unlink()


def flip_index(hub: Hub) -> None:
    flip(hub.root / "registry.json", 3)


def folder_for_blob(hub: Hub) -> None:
    path = weights_of(hub, "a@2")
    path.unlink()
    path.mkdir()


def forge_size(hub: Hub) -> None:
    """A record whose digest is right, but that gives another size than the file has."""
    depot = Depot(hub.root)
    record = hub.record("a@2")
    files = tuple(replace(entry, size=entry.size + 1) for entry in record.files)
    depot.records.path("a", 2).write_bytes(Record.new("a", 2, record.spec, files, record.tensors).source)


def forge_tensors(hub: Hub) -> None:
    """A record whose digest is right, as it does not cover the list of tensors."""
    path = Depot(hub.root).records.path("a", 2)
    path.write_bytes(path.read_bytes().replace(b'"classifier.bias"', b'"classifier.bios"'))


def swap_files(hub: Hub) -> None:
    """A record whose files are intact, but are those of an adapter with other tensors."""
    depot = Depot(hub.root)
    one, two = hub.record("a@1"), hub.record("a@2")
    depot.records.path("a", 2).write_bytes(Record.new("a", 2, two.spec, one.files, two.tensors).source)


@pytest.mark.parametrize(
    ("damage", "ref", "where", "what"),
    [
        (remove_blob, "a@2", ".hub/blobs/sha256/", "is missing"),
        (truncate_blob, "a@2", ".hub/blobs/sha256/", "recorded is sha256:"),
        (flip_blob, "a@2", ".hub/blobs/sha256/", "recorded is sha256:"),
        (flip_record, "a@2", ".hub/records/a/2.json", "not what its digest says"),
        (move_record, "a@3", ".hub/records/a/3.json", "holds a@2"),
        (break_alias, None, ".hub/aliases/a.jsonl", "JSON"),
        (cut_alias, None, ".hub/aliases/a.jsonl", "end of its last line"),
        (dangling_alias, None, ".hub/aliases/a.jsonl", "a@9"),
        (edit_index, None, "registry.json", "records and alias logs"),
        (flip_index, None, "registry.json", "records and alias logs"),
        (folder_for_blob, "a@2", ".hub/blobs/sha256/", "cannot be read"),
        (forge_size, "a@2", ".hub/records/a/2.json", "recorded are"),
        (forge_tensors, "a@2", ".hub/records/a/2.json", "other tensors"),
        (swap_files, "a@2", ".hub/records/a/2.json", "other tensors"),
        (lose_index, None, "registry.json", "is missing"),
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


@pytest.mark.parametrize(
    "damage",
    [remove_blob, truncate_blob, flip_blob, folder_for_blob, flip_record, forge_size, forge_tensors, swap_files],
)
def test_the_remedy_helps(hub: Hub, tmp_path: Path, damage: Callable[[Hub], None]) -> None:
    copytree(hub.root, tmp_path / "good")
    damage(hub)
    problem = hub.verify().problems[0]
    if "put this file aside" in problem.remedy:
        (hub.root / problem.where).rename(tmp_path / "aside")
    assert "pull the version again from another hub" in problem.remedy
    hub.pull(f"{(tmp_path / 'good').as_uri()}/{problem.ref}")
    assert hub.verify().problems == ()
    assert same(hub.get("a@2"), lora(1))


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
    assert len(report.leftovers) == 1, "the configuration is needed by a@1 too"


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
    assert "pull the version again" in output
    code, output = run(hub, "verify", "--json")
    found = json.loads(output)
    assert (code, found["ok"], found["report"]["problems"][0]["ref"]) == (1, False, "a@2")
    edit_index(hub)
    code, output = run(hub, "verify", "a@1", "--rebuild")
    assert code == 0
    assert run(hub, "list")[1].count("2") >= 1


def test_every_byte_counts(hub: Hub) -> None:
    """Whichever byte of a record, the index, an alias log or a blob is flipped, it is found, but in a time of day."""
    records, aliases = (hub.root / ".hub" / folder for folder in ("records", "aliases"))
    tried, unnoticed = 0, []
    for path in (
        records / "org" / "b" / "1.json",
        hub.root / "registry.json",
        aliases / "a.jsonl",
        weights_of(hub, "org/b"),
    ):
        data = path.read_bytes()
        times = {at for match in re.finditer(rb"20[0-9T:+-]{23}", data) for at in range(*match.span())}
        for at in sorted({*range(0, len(data), max(1, len(data) // 40)), len(data) - 1} - times):
            flip(path, at)
            tried += 1
            if hub.verify().ok:
                unnoticed.append((path.name, at))
            path.write_bytes(data)
    assert hub.verify().ok
    assert tried > 130
    assert unnoticed == []


def test_a_damaged_record_hides_no_damage_of_the_index(hub: Hub) -> None:
    (hub.root / ".hub" / "records" / "a" / "2.json").write_bytes(b"{}")
    assert [problem.ref for problem in hub.verify().problems] == ["a@2"], (
        "the index cannot be made anew, nor is it wrong"
    )
    index = hub.root / "registry.json"
    right = index.read_bytes()
    index.write_bytes(right.replace(b'"method": "bottleneck"', b'"method": "lora"'))
    assert [problem.where for problem in hub.verify().problems] == [".hub/records/a/2.json", "registry.json"]
    index.write_bytes(right[:-9])
    assert [problem.where for problem in hub.verify().problems] == [".hub/records/a/2.json", "registry.json"]


def test_a_note_excuses_only_its_own_rows(hub: Hub) -> None:
    (hub.root / ".hub" / "pending").write_bytes(b'["org/b"]\n')
    edit_index(hub)
    assert [problem.where for problem in hub.verify().problems] == ["registry.json"]


def test_a_damaged_file_on_the_way_to_a_version(hub: Hub) -> None:
    break_alias(hub)
    report = hub.verify(["a:prod", "a@2", "a@2", "org/b"])
    assert [problem.ref for problem in report.problems] == ["a:prod"]
    assert report.versions == 2


def test_an_ancestor_that_is_not_needed_is_a_note(hub: Hub) -> None:
    parents = (
        Parent("gone@1", "sha256:" + "0" * 64, "merged"),
        Parent("a@1", hub.record("a@1").digest, "continued"),
    )
    hub.put("c", lora(5, parents=parents))
    for report in (hub.verify(), hub.verify(["c"])):
        assert report.ok
        (note,) = report.notes
        assert (note.ref, "merged of gone@1" in note.what) == ("c@1", True)


def test_a_parent_that_came_meanwhile(hub: Hub) -> None:
    """A version that appears while bytes are hashed is no problem, nor is one that is composed of it."""
    other = Hub.create(hub.root.parent / "other")
    digest = other.record(other.put("a", lora(7), version=9)).digest
    hub.put("c", lora(5, parents=(Parent("a@9", digest, "composed"),)))
    assert [problem.ref for problem in hub.verify().problems] == ["c@1"]
    came: list[int] = []

    def progress(*_: object) -> None:
        if not came:
            came.append(1)
            hub.pull(f"{other.root.as_uri()}/a@9")

    report = hub.verify(progress=progress)
    assert came
    assert report.problems == ()
    assert report.versions == 4


def test_strays_are_notes(hub: Hub) -> None:
    strays = ("records/a/1.json.bak", "notes.txt", "blobs/sha256/zz", "aliases/UP.jsonl", "signatures/a/1/x.json")
    for name in strays:
        path = hub.root / ".hub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?")
    report = hub.verify()
    assert report.ok
    assert sorted(note.where for note in report.notes) == sorted(f".hub/{name}" for name in strays)
    assert report.leftovers == ()


def test_what_gc_removes_is_listed(hub: Hub) -> None:
    depot = Depot(hub.root)
    depot.blobs.write(b"nobody's")
    (depot.tmp / "0123").write_bytes(b"half")
    report = hub.verify()
    assert report.ok
    assert {(item.size, item.why) for item in report.leftovers} == {
        (8, "no version needs it"),
        (4, "temporary file of a broken write"),
    }
    assert report.leftovers == hub.gc().removed
    assert hub.verify().leftovers == ()


def test_signatures_have_the_form_of_one(hub: Hub, tmp_path: Path) -> None:
    create_key(tmp_path / "key")
    hub.sign("a@1", load_private_key(tmp_path / "key"))
    (path,) = (hub.root / ".hub" / "signatures" / "a" / "1").iterdir()
    right = path.read_bytes()
    assert hub.verify().ok
    for wrong in (
        b"",
        right[:-1],
        b" " + right,
        right.replace(b'"a"', b'"b"'),
        right.replace(b'"signature":"', b'"signature":"AAAA'),
        b"[]\n",
        b"[" * 100_000,
    ):
        path.write_bytes(wrong)
        (problem,) = hub.verify().problems
        assert problem.where == path.relative_to(hub.root).as_posix()
        assert "pull" in problem.remedy
    path.write_bytes(right)
    elsewhere = path.parent.parent / "2" / path.name
    elsewhere.parent.mkdir()
    path.rename(elsewhere)
    (problem,) = hub.verify().problems
    assert (problem.ref, "a@1" in problem.what) == ("a@2", True)


def test_a_hub_that_cannot_be_locked_is_verified(hub: Hub) -> None:
    """As on a medium that cannot be written to; a folder in the lock's place is refused even to root."""
    lock = hub.root / ".hub" / "lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()
    edit_index(hub)
    assert [problem.where for problem in hub.verify().problems] == ["registry.json"]


def test_a_rebuild_that_is_not_possible_ends_nothing(hub: Hub) -> None:
    (hub.root / ".hub" / "records" / "a" / "2.json").write_bytes(b"{}")
    flip_blob_of = weights_of(hub, "org/b")
    flip(flip_blob_of, -1)
    code, output = run(hub, "verify", "--rebuild", "--json")
    problems = json.loads(output)["report"]["problems"]
    assert code == 1
    assert [problem["where"] for problem in problems][:2] == ["registry.json", ".hub/records/a/2.json"]
    assert problems[2]["ref"] == "org/b@1"


def test_the_command_demands_signatures(hub: Hub, tmp_path: Path) -> None:
    for name in ("mine", "other"):
        create_key(tmp_path / name)
    for ref in ("a@1", "a@2", "org/b"):
        hub.sign(ref, load_private_key(tmp_path / "mine"))
    mine, other = (str(tmp_path / f"{name}.pub") for name in ("mine", "other"))
    code, output = run(hub, "verify", "--key", other, "--key", mine)
    assert (code, output.count(" is signed by ")) == (0, 3)
    code, output = run(hub, "verify", "a@2", "--key", other)
    assert (code, "a@2" in output, "from its author" in output) == (1, True, True)
