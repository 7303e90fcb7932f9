"""`hub compose hyperformer` on the committed example task and a tiny base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from graftory import Hub
from graftory.cli import cli
from tests.test_cli_train import TASK, make_base

QUICK = ("--epochs", "1", "--size", "4", "--embedding", "8", "--hidden", "8")


def invoke(root: Path, *args: object) -> Result:
    return CliRunner().invoke(cli, ["--registry", str(root), *map(str, args)])


def run(root: Path, *args: object) -> Result:
    result = invoke(root, *args)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub with a hyperformer of two tasks, and a third task."""
    folder = tmp_path_factory.mktemp("hyper")
    base = make_base(folder / "base", seed=0)
    text = (
        Path(TASK).read_text().replace("data:", "data:").replace("tickets.csv", str(Path(TASK).parent / "tickets.csv"))
    )
    for name in ("one", "two", "three"):
        (folder / f"{name}.yaml").write_text(text.replace("name: tickets", f"name: {name}"))
    Hub.create(folder / "hub")
    tasks = (folder / "one.yaml", folder / "two.yaml")
    out = run(folder / "hub", "compose", "hyperformer", *tasks, "--base", base, "--name", "many", *QUICK).output
    assert out.startswith("trained many@1 on one, two")
    return folder


def test_it_is_a_version_with_the_metrics_of_each_task(home: Path) -> None:
    record = Hub.open(home / "hub").record("many")
    assert [(metric.name, metric.data) for metric in record.spec.metrics] == [
        (name, task) for task in ("one", "two") for name in ("accuracy", "loss")
    ]
    assert record.spec.lineage.parameters["tasks"] == [str(home / "one.yaml"), str(home / "two.yaml")]
    assert "many@1" in run(home / "hub", "log", "many").output
    assert "hyperformer" in run(home / "hub", "show", "many").output


def test_eval_and_predict_take_one_of_its_tasks(home: Path) -> None:
    hub = Hub.open(home / "hub")
    (first, *_) = json.loads(run(home / "hub", "eval", "many", "--task", home / "two.yaml", "--json").output)
    recorded = [metric.value for metric in hub.record("many").spec.metrics if metric.data == "two"]
    assert first["metric"]["value"] == recorded[0]
    assert "label" in run(home / "hub", "predict", "many", "my card is charged", "--task", "two").output
    refused = invoke(home / "hub", "predict", "many", "my card is charged")
    assert "pass --task with one of one, two" in refused.stderr


def test_a_task_is_exported_and_does_the_same_in_another_process(home: Path) -> None:
    run(home / "hub", "compose", "export-task", "many", "two", "--name", "plain")
    ask = ["My card was charged twice.", "Where is my parcel?", "--json"]
    want = json.loads(run(home / "hub", "predict", "many", *ask, "--task", "two").output)
    remote = (home / "remote").as_uri()
    run(home / "hub", "push", "plain", remote)
    run(home / "hub", "push", "many", remote)
    there = ["--registry", str(home / "there")]
    for command in (
        ["init", str(home / "there")],
        [*there, "pull", f"{remote}/plain"],
        [*there, "pull", f"{remote}/many"],
    ):
        subprocess.run([sys.executable, "-c", "from graftory.cli import main; main()", *command], check=True)
    for command in ([*there, "predict", "plain", *ask], [*there, "predict", "many", *ask, "--task", "two"]):
        code = [sys.executable, "-c", "from graftory.cli import main; main()", *command]
        done = subprocess.run(code, check=True, capture_output=True, text=True)
        for got, wanted in zip(json.loads(done.stdout), want, strict=True):
            assert got["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
    log = run(home / "hub", "log", "plain").output
    assert "many@1" in log
    assert "generated" in log


def test_a_task_more_learns_its_embedding_alone(home: Path) -> None:
    run(
        home / "hub",
        "compose",
        "hyperformer",
        home / "three.yaml",
        "--from",
        "many@1",
        "--name",
        "many",
        "--epochs",
        "1",
    )
    hub = Hub.open(home / "hub")
    record = hub.record("many@2")
    assert [(parent.ref, parent.relation) for parent in record.spec.lineage.parents] == [("many@1", "continued")]
    before = {entry.name: entry.sha256 for entry in hub.record("many@1").tensors}
    after = {entry.name: entry.sha256 for entry in record.tensors}
    assert {name for name in after if after[name] != before.get(name)} == {
        name for name in after if name.startswith("tasks.2.")
    }
    refused = invoke(
        home / "hub", "compose", "hyperformer", home / "three.yaml", "--from", "many@1", "--name", "x", "--size", 3
    )
    assert "leave --size out" in refused.stderr
