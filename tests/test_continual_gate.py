"""The gate: what is rejected leaves no trace in what comes after, and is told everywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from graftory.cli import cli
from graftory.continual import Event, load_sequence, run_sequence
from graftory.continual.gate import Verdict, judge, ways_of
from graftory.continual.router_file import load_router
from graftory.continual.state import RunFolder
from graftory.errors import ConfigError
from graftory.hub import Hub
from tests.continual_samples import make_place, sequence_file, short_run

LONG = {"epochs": 10, "learning_rate": 0.01, "batch_size": 8}
"""As in the sequence files."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`turned` is `colours` with the labels the other way round; `shades` is `colours` under another name."""
    root = make_place(tmp_path_factory.mktemp("place"))
    for name, words in (("turned", {"warm": "cold", "cold": "warm"}), ("shades", {})):
        for split in ("train", "test"):
            head, *rows = (root / f"colours-{split}.csv").read_text().splitlines()
            # in another order other rows are chosen, so that the router does not see the very same ones
            turn = -1 if (name, split) == ("turned", "train") else 1
            pairs = [row.rsplit(",", 1) for row in rows[::turn]]
            (root / f"{name}-{split}.csv").write_text("\n".join([head, *(f"{t},{words.get(y, y)}" for t, y in pairs)]))
        (root / f"{name}.yaml").write_text((root / "colours.yaml").read_text().replace("colours", name))
    return root


@pytest.fixture(scope="module")
def gated(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Hub, RunFolder]:
    """From the command line: one head for all, so `turned` undoes `colours`."""
    root = tmp_path_factory.mktemp("gated")
    path = sequence_file(place, "seq", ["colours", "turned", "shades"])
    path.write_text(path.read_text() + "scenario: domain\n")
    hub = Hub.create(root / "hub")
    arguments = ["continual", "run", str(path), "--max-drop", "0.05", "--dir", str(root / "run"), "--json"]
    done = CliRunner().invoke(cli, ["--registry", str(root / "hub"), *arguments])
    assert done.exit_code == 0, done.output
    assert "task 2 of 3, turned: rejected" in done.stderr
    return json.loads(done.stdout), hub, RunFolder(root / "run")


def test_the_largest_drop_is_held_against_the_bound() -> None:
    before, after = {"a": 0.9, "b": 0.8, "c": 0.5}, {"a": 0.88, "b": 0.7, "c": 0.6}
    found = judge(before, after, 0.05)
    assert found == Verdict(False, found.drop, "b")
    assert found.drop == pytest.approx(0.1)
    assert judge(before, after, 0.1).accepted  # 0.8 - 0.7 is a little more than 0.1 in floating point
    better = judge({"c": 0.5}, {"c": 0.6}, 0.0)
    assert better == Verdict(True, better.drop, "c")
    assert better.drop == pytest.approx(-0.1)
    assert judge({}, {}, 0.0) == Verdict(True, 0.0, "")
    assert ways_of("domain", routable=True)[0] == "routed"
    assert ways_of("task", routable=True) == ways_of("domain", routable=False) == ("oracle",)


def test_a_rejected_step_is_told_everywhere(gated: tuple[dict[str, Any], Hub, RunFolder]) -> None:
    report, hub, folder = gated
    [rejected] = report["rejected"]
    assert (rejected["step"], rejected["task"], rejected["ref"]) == (2, "turned", "run@2")
    assert rejected["fell"] == "colours"
    assert rejected["drop"] == pytest.approx(report["matrix"][0][0] - rejected["scores"][0])
    assert rejected["drop"] > 0.3
    # the same rows, so what is right for one is wrong for the other
    assert rejected["scores"][0] + rejected["scores"][1] == pytest.approx(1.0)
    assert [commit.accepted for commit in folder.commits()] == [True, False, True]
    [event] = [event for event in folder.events() if event.phase == "rejected"]
    assert (event.step, event.detail["task"], event.detail["max_drop"]) == (2, "colours", 0.05)
    assert hub.record("run@2").spec.lineage.parameters["gate"]["accepted"] is False
    assert hub.record("run@3").spec.lineage.parameters["gate"]["accepted"] is True
    assert hub.aliases("run") == {"accepted": 3}
    assert "## Rejected by the gate" in (folder.root / "report.md").read_text()
    status = CliRunner().invoke(cli, ["continual", "status", str(folder.root)])
    assert "rejected: colours -" in status.stdout


def test_after_a_rejected_step_the_last_accepted_one_is_in_force(
    gated: tuple[dict[str, Any], Hub, RunFolder], place: Path, tmp_path: Path
) -> None:
    """As if the task had never been there: bit for bit the run without it."""
    report, hub, _ = gated
    assert report["matrix"][1] == report["matrix"][0]
    plain, versions, _ = short_run(place, tmp_path, "seq", ["colours", "shades"], scenario="domain", train=LONG)
    for ref, other in (("run@1", versions[0]), ("run@3", versions[1])):
        here = hub.get(ref).tensors
        assert all(torch.equal(here[key], tensor) for key, tensor in other.tensors.items())
    assert not torch.equal(hub.get("run@2").tensors["classifier.weight"], versions[1].tensors["classifier.weight"])
    [parent] = hub.record("run@3").spec.lineage.parents
    assert (parent.ref, parent.digest) == ("run@1", hub.record("run@1").digest)
    assert [report["matrix"][2][j] for j in (0, 2)] == list(plain.matrix[1])


def test_the_router_forgets_a_rejected_task_even_if_the_run_is_stopped_there(place: Path, tmp_path: Path) -> None:
    """A router cannot tell the same texts apart, so with `turned` it would send rows of `colours` there."""
    base = load_sequence(sequence_file(place, "isolated", ["colours", "turned", "shades"]))
    sequence = replace(base, scenario="domain", max_drop=0.05)
    hub, root = Hub.create(tmp_path / "hub"), tmp_path / "run"

    class StoppedError(Exception):
        pass

    for phase in ("rejected", "commit"):

        def stop(event: Event, phase: str = phase) -> None:
            if (event.step, event.phase) == (2, phase):
                raise StoppedError

        with pytest.raises(StoppedError):
            run_sequence(sequence, hub, root, progress=stop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graftory.continual.runner.write_report", lambda *_: None)
        report = run_sequence(sequence, hub, root)
    assert [each.task for each in report.rejected] == ["turned"]
    assert load_router(root / "router.safetensors").names == ("colours", "shades")
    assert not (root / "router-next.safetensors").exists()
    assert report.routing is not None
    assert report.routing.matrix[1][0] == report.routing.matrix[0][0]
    # its rows go to the adapter of `colours`, which is wrong where that is right
    assert report.routing.matrix[1][1] == pytest.approx(1 - (report.routing.matrix[1][0] or 0), abs=0.05)
    assert hub.versions("run-turned") == (1,)
    assert hub.aliases("run-turned") == {}
    assert hub.aliases("run-shades") == {"accepted": 1}


def test_the_bound_is_a_share(place: Path) -> None:
    sequence = load_sequence(sequence_file(place, "seq"))
    for wrong in (-0.1, 2.0, float("nan")):
        with pytest.raises(ConfigError, match="wanted a share from 0 to 1"):
            replace(sequence, max_drop=wrong)
