"""`hub compose pha` from rows to a pushed adapter, on the committed example task and a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graftory import Hub
from tests.test_cli_hyperformer import QUICK, invoke, run
from tests.test_cli_train import TASK, make_base


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub with a generator of two tasks, and a third task."""
    folder = tmp_path_factory.mktemp("pha")
    base = make_base(folder / "base", seed=0)
    text = Path(TASK).read_text().replace("tickets.csv", str(Path(TASK).parent / "tickets.csv"))
    for name in ("one", "two", "three"):
        (folder / f"{name}.yaml").write_text(text.replace("name: tickets", f"name: {name}"))
    Hub.create(folder / "hub")
    tasks, options = (folder / "one.yaml", folder / "two.yaml"), ("--retriever", "8", "--contrast", "0.5")
    out = run(folder / "hub", "compose", "pha", *tasks, "--base", base, "--name", "many", *QUICK, *options).output
    assert out.startswith("trained many@1 on one, two")
    return folder


def test_from_rows_to_a_pushed_adapter(home: Path) -> None:
    hub = Hub.open(home / "hub")
    record = hub.record("many")
    assert record.spec.method == "pha"
    assert [(metric.name, metric.data) for metric in record.spec.metrics] == [
        (name, task) for task in ("one", "two") for name in ("accuracy", "loss")
    ]
    run(home / "hub", "compose", "export-task", "many", "two", "--name", "plain")
    ask = ["My card was charged twice.", "Where is my parcel?", "--json"]
    want = json.loads(run(home / "hub", "predict", "many", *ask, "--task", "two").output)
    remote = (home / "remote").as_uri()
    run(home / "hub", "push", "plain", remote)
    run(home / "there", "init", home / "there")
    run(home / "there", "pull", f"{remote}/plain")
    for got, wanted in zip(json.loads(run(home / "there", "predict", "plain", *ask).output), want, strict=True):
        assert got["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)


def test_a_task_more_says_where_it_starts(home: Path) -> None:
    more = ("--name", "many", "--epochs", "1", "--rows", "12")
    result = run(home / "hub", "compose", "pha", home / "three.yaml", "--from", "many@1", *more, "--json")
    found = json.loads(result.output)
    assert found["nearest"] in ("one", "two")
    assert found["similarities"].keys() == {"one", "two"}
    record = Hub.open(home / "hub").record("many@2")
    assert [(parent.ref, parent.relation) for parent in record.spec.lineage.parents] == [("many@1", "continued")]
    refused = invoke(home / "hub", "compose", "hyperformer", home / "three.yaml", "--from", "many@1", "--name", "x")
    assert "is a pha, wanted a hyperformer" in refused.stderr
    refused = invoke(home / "hub", "compose", "pha", home / "one.yaml", "--from", "many@1", "--name", "x", "--size", 3)
    assert "leave --size out" in refused.stderr
