"""Orders × seeds: all combinations run, are resumed, and are summed up by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
from click.testing import CliRunner, Result

from graftory.cli import cli
from graftory.continual import Event, Study, load_sequence, load_study, run_study
from graftory.continual.study import StudyRun, drawn_orders
from graftory.errors import ConfigError
from graftory.hub import Hub
from tests.continual_samples import make_place, sequence_file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def study_file(place: Path, more: str, tasks: tuple[str, ...] = ("colours", "animals")) -> Path:
    path = sequence_file(place, "seq", tasks, name="many")
    text = path.read_text().replace("seed: 3\n", "").replace("epochs: 10", "max_steps: 12")
    path.write_text(text + more)
    return path


def call(root: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["--registry", str(root / "hub"), "continual", *map(str, arguments)])


def test_all_combinations_run_and_go_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftory.continual.report_files._pictures", lambda _: {})
    path = study_file(place, "orders: 2\nseeds: [0, 5]\n")
    hub, root = Hub.create(tmp_path / "hub"), tmp_path / "runs"

    class StoppedError(Exception):
        pass

    def stop(run: StudyRun, event: Event) -> None:
        if (run.folder, event.step, event.phase) == ("order-1-seed-5", 2, "prepare"):
            raise StoppedError

    with pytest.raises(StoppedError):
        run_study(load_study(path), hub, root, progress=stop)
    status = call(tmp_path, "status", root)
    assert [line.split() for line in status.stdout.splitlines()[1:]] == [
        ["order-1-seed-0", "2"],
        ["order-1-seed-5", "1"],
        ["order-2-seed-0", "0"],
        ["order-2-seed-5", "0"],
    ]
    done = call(tmp_path, "run", path, "--dir", root, "--json")
    assert done.exit_code == 0, done.output
    trained = [line for line in done.stderr.splitlines() if line.endswith("train")]
    assert [line.split(",")[0] for line in trained] == [
        "order-1-seed-5", "order-2-seed-0", "order-2-seed-0", "order-2-seed-5", "order-2-seed-5",
    ]  # fmt: skip
    found = json.loads(done.stdout)
    assert [run["order"] for run in found["runs"]] == [[1, 2], [1, 2], [2, 1], [2, 1]]
    first = [report["results"][0]["name"] for report in found["reports"]]
    assert first == ["colours", "colours", "animals", "animals"]
    accs = [sum(report["matrix"][-1]) / 2 for report in found["reports"]]
    assert found["spreads"]["acc"]["mean"] == pytest.approx(fmean(accs))
    assert found["spreads"]["acc"]["deviation"] == pytest.approx(stdev(accs))
    assert found["spreads"]["bwt"]["runs"] == 4
    assert "transfer" not in found["spreads"]
    assert {row.name for row in hub.index()} == {f"many-order-{o}-seed-{s}" for o in (1, 2) for s in (0, 5)}
    shown = f"{100 * fmean(accs):.1f} ± {100 * stdev(accs):.1f}"
    assert f"| {shown} |" in (root / "study.md").read_text()
    assert "</table>" in (root / "study.html").read_text()
    again = call(tmp_path, "run", path, "--dir", root)
    assert "train" not in again.stderr
    assert shown in again.stdout
    assert call(tmp_path, "compare", root, "--json").exit_code == 0
    assert len(json.loads(call(tmp_path, "report", root, "--json").stdout)) == 4


def test_orders_are_drawn_once_for_all() -> None:
    assert drawn_orders(1, 3) == ((1, 2, 3),)
    assert drawn_orders(4, 3)[:3] == drawn_orders(3, 3)
    assert sorted(drawn_orders(6, 3)) == sorted({*drawn_orders(6, 3)})
    assert all(sorted(order) == [1, 2, 3] for order in drawn_orders(6, 3))
    with pytest.raises(ConfigError, match="orders: got 7, wanted 1 to 6 for 3 tasks"):
        drawn_orders(7, 3)


def test_orders_may_be_listed(place: Path) -> None:
    listed = "orders: [[animals.yaml, colours.yaml]]\n"
    study = load_study(study_file(place, listed))
    assert study.orders == ((2, 1),)
    [run] = study.runs()
    assert [Path(task).name for task in study.sequence_of(run).tasks] == ["animals.yaml", "colours.yaml"]
    assert not study.is_one
    assert load_study(study_file(place, "seed: 3\n")).is_one


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("orders: [[animals.yaml]]\n", "wanted the tasks of 'tasks', each once"),
        ("orders: 3\n", "wanted 1 to 2 for 2 tasks"),
        ("orders: [[animals.yaml, colours.yaml], [animals.yaml, colours.yaml]]\n", "one comes twice"),
        ("seeds: [1, 1]\n", "one comes twice"),
        ("seeds: [a]\n", r"seeds\[0\]"),
        ("seed: 1\nseeds: [1]\n", "both seed and seeds"),
        ("order: 3\n", "unknown key 'order'"),
    ],
)
def test_studies_are_read_strictly(place: Path, more: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_study(study_file(place, more))


def test_a_sequence_is_one_run(place: Path) -> None:
    with pytest.raises(ConfigError, match="seeds are several runs"):
        load_sequence(study_file(place, "seeds: [1, 2]\n"))
    sequence = load_study(study_file(place, "")).sequence
    with pytest.raises(ConfigError, match=r"orders: got \[1, 1\]"):
        Study(sequence, orders=((1, 1),))
    assert replace(Study(sequence), seeds=(4,)).runs()[0].seed == 4
