"""Whole sequences on a tiny random BERT and made-up tasks: what they promise, and being killed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from graftory.adapter import Parent
from graftory.continual import Event, Report, compare_runs, load_report, load_sequence, run_sequence
from graftory.continual.files import append_event, read_events
from graftory.continual.freeze import must_stay
from graftory.continual.router_file import load_router
from graftory.continual.router_fit import router_features
from graftory.continual.state import RunFolder
from graftory.errors import ConfigError, CorruptAdapterError, GraftoryError
from graftory.hub import Hub
from tests.continual_samples import TASKS, make_place, sequence_file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def run(path: Path, root: Path, **arguments: Any) -> tuple[Report, Hub]:
    hub = Hub.create(root / "hub")
    return run_sequence(load_sequence(path), hub, root / "run", **arguments), hub


@pytest.fixture(scope="module")
def isolated(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Hub, Path]:
    root = tmp_path_factory.mktemp("isolated")
    return (*run(sequence_file(place, "isolated"), root), root / "run")


@pytest.fixture(scope="module")
def seq(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Hub, Path]:
    root = tmp_path_factory.mktemp("seq")
    return (*run(sequence_file(place, "seq"), root), root / "run")


def refs(report: Report) -> list[str]:
    return [result.ref for result in report.results]


def digests(report: Report, hub: Hub) -> list[str]:
    return [hub.record(ref).digest for ref in refs(report)]


def test_isolated_forgets_exactly_nothing(isolated: tuple[Report, Hub, Path]) -> None:
    report = isolated[0]
    assert report.summary.bwt == 0.0
    assert report.summary.forgetting == 0.0
    assert report.summary.fwt == 0.0
    for j in range(3):
        assert [row[j] for row in report.matrix[:j]] == [report.results[j].untrained] * j
        assert len({row[j] for row in report.matrix[j:]}) == 1
        assert report.matrix[j][j] > max(0.8, report.results[j].untrained)
    assert refs(report) == ["run-colours@1", "run-animals@1", "run-tools@1"]
    assert {(result.train_rows, result.test_rows) for result in report.results} == {(48, 30)}


def test_only_what_changed_is_measured_again(isolated: tuple[Report, Hub, Path], seq: tuple[Report, Hub, Path]) -> None:
    untrained = {(1, 1), (1, 2), (2, 2)}
    assert copied_cells(isolated[2]) == untrained | {(2, 0), (3, 0), (3, 1)}
    assert copied_cells(seq[2]) == set()  # the one body is another at every step


def copied_cells(folder: Path) -> set[tuple[int, int]]:
    run = RunFolder(folder)
    return {(i, j) for i in range(4) for j in range(3) if (cell := run.cell(i, j, "oracle")) and cell.copied}


def test_what_is_not_measured_again_would_give_the_same(isolated: tuple[Report, Hub, Path], place: Path) -> None:
    from graftory.continual.evaluation import TestSet, oracle_cell, routed_cell
    from graftory.continual.strategies import Answer
    from graftory.continual.unchanged import mark
    from graftory.data import load_rows, load_task
    from graftory.training import load_base

    report, hub, folder = isolated
    sequence = RunFolder(folder).sequence()
    loaded = load_base(sequence.base, "classification")
    tests = [
        TestSet(task, load_rows(task, "test", limit=sequence.limits.test, seed=sequence.seed))
        for task in (load_task(str(place / f"{name}.yaml")) for name in TASKS)
    ]
    adapters = [hub.get(ref) for ref in refs(report)]
    answers = {name: Answer(adapter, adapter) for name, adapter in zip(TASKS, adapters, strict=True)}
    router = load_router(folder / "router.safetensors")
    size = sequence.eval_batch_size
    for j, name in enumerate(TASKS):
        again = oracle_cell(loaded, 3, j, tests[j], answers[name], size)
        kept = RunFolder(folder).cell(3, j, "oracle")
        assert kept is not None
        assert (again.cell.value, mark(answers[name])) == (kept.value, kept.mark)
        choice = router.route(router_features(loaded, router, tests[j].rows.texts, size))
        routed = routed_cell(loaded, 3, j, tests, answers, router, choice, size)
        stored = RunFolder(folder).cell(3, j, "routed")
        assert stored is not None
        assert (routed.value, routed.routes) == (stored.value, stored.routes)


def test_rows_that_go_where_they_went_are_not_measured_again(isolated: tuple[Report, Hub, Path]) -> None:
    """The tasks share no word, so hardly a row is in doubt; a cell is taken over only with the routes it had."""
    run, copied = RunFolder(isolated[2]), []
    for step in (2, 3):
        for j in range(step - 1):
            before, after = run.cell(step - 1, j, "routed"), run.cell(step, j, "routed")
            assert before is not None
            assert after is not None
            copied.append(after.copied)
            assert after.copied == (after.mark == before.mark)
            assert not after.copied or (after.routes, after.value) == (before.routes, before.value)
    assert any(copied)


def test_isolated_does_not_depend_on_the_order(place: Path, isolated: tuple[Report, Hub, Path], tmp_path: Path) -> None:
    report, hub = run(sequence_file(place, "isolated", ["tools", "colours", "animals"]), tmp_path)
    for j, task in enumerate(report.tasks):
        k = isolated[0].tasks.index(task)
        assert report.matrix[-1][j] == isolated[0].matrix[-1][k]
        here, there = hub.get(refs(report)[j]).tensors, isolated[1].get(refs(isolated[0])[k]).tensors
        assert all(torch.equal(here[key], there[key]) for key in there)


def test_the_router_stands_beside_the_oracle(isolated: tuple[Report, Hub, Path]) -> None:
    report, _, folder = isolated
    routing = report.routing
    assert routing is not None
    assert routing.id_accuracy > 0.9  # the tasks share no word
    assert [sum(row) for row in routing.confusion] == [30, 30, 30]
    assert routing.regret == pytest.approx(report.summary.acc - routing.acc)
    assert routing.matrix[0][1:] == (None, None)
    own = sum(row[j] for j, row in enumerate(routing.confusion)) / 90
    assert routing.id_accuracy == pytest.approx(own)
    for j, value in enumerate(routing.matrix[-1]):
        assert value is not None
        assert value <= routing.confusion[j][j] / 30  # a row sent elsewhere is wrong, as no two label sets agree
    assert load_router(folder / "router.safetensors").names == ("colours", "animals", "tools")


def test_seq_is_one_adapter_whose_versions_continue_each_other(seq: tuple[Report, Hub, Path]) -> None:
    report, hub, _ = seq
    assert refs(report) == ["run@1", "run@2", "run@3"]
    assert report.routing is None
    records = [hub.record(ref) for ref in refs(report)]
    assert records[0].spec.lineage.parents == ()
    for before, after in pairwise(records):
        assert after.spec.lineage.parents == (Parent(str(before.ref), before.digest, "continued"),)
    assert [record.spec.lineage.process for record in records] == ["continual"] * 3
    assert [record.spec.task.name for record in records if record.spec.task] == list(TASKS)
    assert records[1].spec.lineage.parameters["step"] == 2
    assert records[2].spec.metrics[0].value == report.matrix[2][2]


def test_seq_forgets_where_isolated_does_not(seq: tuple[Report, Hub, Path], isolated: tuple[Report, Hub, Path]) -> None:
    bwt = seq[0].summary.bwt
    assert bwt is not None
    assert bwt < -0.2
    assert seq[0].summary.acc < isolated[0].summary.acc


def test_seq_answers_old_tasks_with_the_newest_body_and_the_old_head(
    seq: tuple[Report, Hub, Path], place: Path
) -> None:
    """R[3][1] again, by hand: plain forward passes, one row at a time."""
    from graftory.adapters import attach
    from graftory.data import load_rows, load_task
    from graftory.training import load_base

    report, hub, _ = seq
    loaded = load_base(str(place / "base"), "classification")
    adapted = attach(loaded.model, {"newest": hub.get("run@3"), "first": hub.get("run@1")})
    rows = load_rows(load_task(str(place / "colours.yaml")), "test", limit=30, seed=3)
    right = 0
    for text, target in zip(rows.texts, rows.targets, strict=True):
        batch = loaded.tokenizer(text, return_tensors="pt")
        with torch.no_grad(), adapted.route("newest", heads="first"):
            right += int(adapted(**batch).logits[0, :2].argmax() == target)
    assert right / 30 == pytest.approx(report.matrix[2][0])


class KilledError(Exception):
    pass


def test_a_run_stopped_in_any_phase_goes_on_to_the_same_end(
    place: Path, isolated: tuple[Report, Hub, Path], tmp_path: Path
) -> None:
    path = sequence_file(place, "isolated")
    for phase in ("prepare", "consolidate", "eval", "commit"):

        def stop(event: Event, phase: str = phase) -> None:
            if (event.step, event.phase) == (2, phase):
                raise KilledError

        with pytest.raises(KilledError):
            run(path, tmp_path, progress=stop)
    report, hub = run(path, tmp_path)
    assert report == isolated[0]
    assert digests(report, hub) == digests(isolated[0], isolated[1])
    events = RunFolder(tmp_path / "run").events()
    assert [event.step for event in events if event.phase == "train"] == [1, 2, 2, 2, 2, 3]
    assert not (tmp_path / "run" / "work" / "002").exists()


def test_a_killed_process_goes_on_to_the_same_end(place: Path, seq: tuple[Report, Hub, Path], tmp_path: Path) -> None:
    path = sequence_file(place, "seq")
    code = (
        "import os, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from graftory.continual import load_sequence, run_sequence\n"
        "from graftory.hub import Hub\n"
        "def die(event):\n"
        "    if (event.step, event.phase) == (3, 'prepare'): os.kill(os.getpid(), 9)\n"
        "run_sequence(load_sequence(sys.argv[1]), Hub.create(sys.argv[2]), sys.argv[3], progress=die)\n"
    )
    arguments = [str(path), str(tmp_path / "hub"), str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    report, hub = run(path, tmp_path)
    assert report.matrix == seq[0].matrix
    assert digests(report, hub) == digests(seq[0], seq[1])
    events = RunFolder(tmp_path / "run").events()
    assert [event.step for event in events if event.phase == "train"] == [1, 2, 3]


def test_a_finished_run_is_not_run_again_and_tasks_can_be_appended(place: Path, tmp_path: Path) -> None:
    first = sequence_file(place, "isolated", ["colours", "animals"])
    run(first, tmp_path)
    events: list[Event] = []
    run(first, tmp_path, progress=events.append)
    assert events == []
    report, _ = run(sequence_file(place, "isolated"), tmp_path, progress=events.append)
    assert [event.task for event in events if event.phase == "train"] == ["tools"]
    assert report.summary.bwt == 0.0
    assert len(report.matrix) == 3


def test_the_folder_of_another_run_is_refused(place: Path, isolated: tuple[Report, Hub, Path], tmp_path: Path) -> None:
    sequence = load_sequence(sequence_file(place, "isolated"))
    with pytest.raises(ConfigError, match=r"another sequence \(other seed\)"):
        run_sequence(replace(sequence, seed=4), isolated[1], isolated[2])
    with pytest.raises(ConfigError, match=r"other tasks"):
        run_sequence(replace(sequence, tasks=sequence.tasks[1:]), isolated[1], isolated[2])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"strategy": "lucky"}, "unknown strategy 'lucky'; known: seq, isolated"),
        ({"train": {"epoch": 1}}, "unknown key 'epoch'"),
        ({"train": {"seed": 1}}, "set that"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    place: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    sequence = replace(load_sequence(sequence_file(place, "isolated")), **change)
    with pytest.raises(GraftoryError, match=reason):
        run_sequence(sequence, Hub.create(tmp_path / "hub"), tmp_path / "run")
    assert not (tmp_path / "run" / "sequence.json").exists()


def test_tasks_must_be_distinct(place: Path, tmp_path: Path) -> None:
    path = sequence_file(place, "isolated", ["colours", "colours"])
    with pytest.raises(ConfigError, match="'colours' comes twice"):
        run(path, tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: a\nbase: b\ntasks: []", "tasks: got none"),
        ("name: a\nbase: b\ntasks: [x]\nmethod: magic", "unknown method 'magic'"),
        ("name: a\nbase: b\ntasks: [x]\noptions: {ranks: 3}", "unknown key 'ranks'"),
        ("name: a\nbase: b", "'tasks' is missing"),
        ("name: a/b\nbase: b\ntasks: [x]", "without '/'"),
        ("{", "cannot read"),
    ],
)
def test_sequence_files_are_read_strictly(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        load_sequence(path)
    with pytest.raises(ConfigError, match="no sequence file"):
        load_sequence(tmp_path / "missing.yaml")


def test_the_report_is_written_for_programs_and_for_people(isolated: tuple[Report, Hub, Path]) -> None:
    report, _, folder = isolated
    assert load_report(folder) == report
    assert json.loads((folder / "report.json").read_text())["summary"]["bwt"] == 0.0
    text = (folder / "report.md").read_text()
    assert "| run | isolated | given |" in text
    assert "heatmap-routed.png" in text
    for name in ("heatmap-oracle.png", "heatmap-routed.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_runs_stand_beside_each_other(isolated: tuple[Report, Hub, Path], seq: tuple[Report, Hub, Path]) -> None:
    rows = compare_runs([seq[0], isolated[0]])
    assert [(row["strategy"], row["task id"]) for row in rows] == [
        ("seq", "given"),
        ("isolated", "given"),
        ("isolated", "router"),
    ]
    assert rows[1]["BWT"] == "0"
    assert rows[0]["regret"] == rows[2]["BWT"] == "–"
    assert rows[0]["ACC"] == f"{100 * seq[0].summary.acc:.1f}"
    assert len({tuple(row) for row in rows}) == 1


def test_a_change_of_something_frozen_is_found() -> None:
    model = torch.nn.Linear(2, 2)
    adapter = {"a": torch.zeros(2)}
    with must_stay(model, {"old@1": adapter}) as digest:
        assert digest.startswith("sha256:")
    with pytest.raises(CorruptAdapterError, match="old@1 changed"), must_stay(model, {"old@1": adapter}):
        adapter["a"][0] = -0.0  # equal as a number, another bit
    with pytest.raises(CorruptAdapterError, match="the base model changed"), must_stay(model, {}):
        torch.nn.init.ones_(model.bias)


def test_a_torn_line_of_the_log_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_event(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"a": 2, "torn')
    append_event(path, {"a": 3})
    assert list(read_events(path)) == [{"a": 1}, {"a": 3}]
