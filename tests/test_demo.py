"""The demo on the real model with a handful of rows: whole, in a folder of its own, and resumable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from graftory import Hub
from graftory.demo import plan, run_demo, steps
from graftory.demo.journal import Journal


def test_journal_keeps_results_and_repeats_what_failed(tmp_path: Path) -> None:
    journal, calls = Journal(tmp_path), []

    def fail() -> int:
        calls.append("fail")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        journal.once("step", fail)
    assert journal.get("step") is None
    assert journal.once("step", lambda: {"x": 1}) == {"x": 1}
    assert Journal(tmp_path).once("step", fail) == {"x": 1}
    assert calls == ["fail"]
    assert [path.name for path in tmp_path.iterdir()] == ["step.json"]


@pytest.fixture
def small_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same demo with a few rows and steps."""
    small = [
        replace(planned, rows=24, settings=replace(planned.settings, max_steps=2, batch_size=8))
        for planned in plan.ADAPTERS
    ]
    monkeypatch.setattr(plan, "ADAPTERS", tuple(small))
    monkeypatch.setattr(plan, "TEST_ROWS", 12)
    monkeypatch.setattr(plan, "SEQUENCE_ROWS", 24)
    monkeypatch.setattr(plan, "SEQUENCE_TEST_ROWS", 8)
    monkeypatch.setattr(plan, "SEQUENCE_TRAINING", {**plan.SEQUENCE_TRAINING, "max_steps": 2})


@pytest.mark.real
@pytest.mark.usefixtures("small_plan")
def test_demo_goes_on_after_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Hub.create(tmp_path)  # as in a checkout: the demo's folder lies inside another hub, which it leaves alone
    folder = tmp_path / "demo"

    def stop(_: steps.Bench) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(steps, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            run_demo(folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "results").iterdir()}
    assert "train-disaster.json" in {path.name for path in before}
    assert not (folder / "results" / "measure.json").exists()

    results = run_demo(folder)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert results["continual-isolated"]["summary"]["bwt"] == 0.0
    assert results["export"]["max_difference"] <= 1e-4
    assert results["share"]["same"]
    hub = Hub.open(folder / "hub")
    assert {row.name for row in hub.index()} >= {"trec", "rotten-tomatoes", "sms", "disaster", "merged", "demo-seq"}
    assert hub.versions("demo-seq") == (1, 2, 3, 4)
    assert (folder / "continual.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "done before" in shown
    assert "isolated: backward transfer (BWT)" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "registry.json", ".hub"}
    assert Hub.open(tmp_path).index() == ()
