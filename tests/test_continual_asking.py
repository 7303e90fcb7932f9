"""Asking a run: what it answers is what its evaluation counted, and what its adapters say by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from graftory import Hub
from graftory.cli import cli
from graftory.continual import LearntRun, RouterSettings
from graftory.continual.router_fit import router_features
from graftory.continual.state import RunFolder
from graftory.data import load_rows, load_task
from graftory.errors import ConfigError, DataError
from graftory.training import Query, predict
from tests.continual_samples import TASKS, make_place, short_run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks, learnt by three strategies."""
    root = make_place(tmp_path_factory.mktemp("asking"))
    for strategy in ("isolated", "seq", "ranpac"):
        short_run(root, root / strategy, strategy, tuple(TASKS))
    return root


def opened(place: Path, strategy: str) -> LearntRun:
    return LearntRun.open(place / strategy / "run", Hub.open(place / strategy / "hub"))


@pytest.mark.parametrize("strategy", ["isolated", "seq", "ranpac"])
def test_answers_are_those_that_the_run_was_measured_by(place: Path, strategy: str) -> None:
    learnt, folder = opened(place, strategy), RunFolder(place / strategy / "run")
    for position, name in enumerate(TASKS):
        rows = load_rows(load_task(str(place / f"{name}.yaml")), "test", limit=30, seed=3)
        asked = learnt.ask(rows.texts, task=name)
        right = [
            one.prediction is not None and one.prediction.label == rows.labels[int(target)]
            for one, target in zip(asked, rows.targets, strict=True)
        ]
        cell = folder.cell(len(TASKS), position, "oracle")
        assert cell is not None
        assert cell.value == pytest.approx(sum(right) / len(right))


def test_the_router_finds_the_task_as_it_did_when_it_was_measured(place: Path) -> None:
    learnt, folder = opened(place, "isolated"), RunFolder(place / "isolated" / "run")
    for position, name in enumerate(TASKS):
        rows = load_rows(load_task(str(place / f"{name}.yaml")), "test", limit=30, seed=3)
        asked = learnt.ask(rows.texts)
        cell = folder.cell(len(TASKS), position, "routed")
        assert cell is not None
        chosen = [one.task or "abstained" for one in asked]
        assert {task: chosen.count(task) for task in sorted(set(chosen))} == dict(cell.routes)
        own = [(one, text) for one, text in zip(asked, rows.texts, strict=True) if one.task == name]
        adapter = next(step.adapter for step in learnt.context.done if step.task == name)
        alone = predict(learnt.loaded, [Query(text, adapter) for _, text in own])
        assert [one.prediction.label for one, _ in own if one.prediction] == [each.label for each in alone]
        assert all(one.certainty is not None and 0 < one.certainty <= 1 for one, _ in own)


def test_tasks_with_one_question_answer_together(place: Path, tmp_path: Path) -> None:
    twin = (place / "tools.yaml").read_text().replace("name: tools", "name: more-tools")
    (place / "more-tools.yaml").write_text(twin)
    tasks, router = ("tools", "more-tools"), RouterSettings(centroids=1, quantile=1.0, answer="mixture")
    short_run(place, tmp_path, "isolated", tasks, scenario="domain", router=router)
    learnt = LearntRun.open(tmp_path / "run", Hub.open(tmp_path / "hub"))
    texts = ["saw shed", "mallet bench", "knife"]
    assert learnt.router is not None
    features = router_features(learnt.loaded, learnt.router, texts, 8)
    weights = learnt.router.route(features).scores.softmax(1)
    parts = [predict(learnt.loaded, [Query(text, step.adapter) for text in texts]) for step in learnt.context.done]
    for number, asked in enumerate(learnt.ask(texts)):
        assert asked.prediction is not None
        assert asked.prediction.probabilities is not None
        for label, probability in asked.prediction.probabilities.items():
            by_hand = sum(
                float(weights[number, t]) * (part[number].probabilities or {})[label] for t, part in enumerate(parts)
            )
            assert probability == pytest.approx(by_hand, abs=1e-6)


def test_what_cannot_be_told_is_said(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"seq has no router to tell colours, animals, tools apart.*--task"):
        opened(place, "seq").ask(["red paint"])
    with pytest.raises(ConfigError, match=r"has not learnt task 'moons'; it knows colours, animals, tools"):
        opened(place, "isolated").ask(["red paint"], task="moons")
    with pytest.raises(DataError, match="holds no run"):
        LearntRun.open(tmp_path, Hub.open(place / "seq" / "hub"))


def test_command(place: Path) -> None:
    hub, folder = str(place / "isolated" / "hub"), str(place / "isolated" / "run")
    row = load_rows(load_task(str(place / "tools.yaml")), "test").texts[0]
    result = CliRunner().invoke(cli, ["--registry", hub, "continual", "predict", folder, str(row), "--json"])
    assert result.exit_code == 0, result.output
    (said,) = json.loads(result.stdout)
    assert said["task"] == "tools"
    assert said["label"] in TASKS["tools"]
    assert said["certainty"] > 0.5
    assert said["probability"] == max(said["probabilities"].values())
    shown = CliRunner().invoke(cli, ["--registry", hub, "continual", "predict", folder, str(row)])
    assert shown.stdout.split()[:4] == ["task", "certainty", "label", "probability"]
