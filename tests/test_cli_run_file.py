"""`--config`: a run from a file is the run from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from graftory import Hub
from graftory.cli import cli
from tests.hub_samples import lora
from tests.test_cli_train import TASK, make_base


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    hub = Hub.create(tmp_path / "hub")
    for seed, name in enumerate("abc"):
        hub.put(name, lora(seed))
    return hub


def invoke(hub: Hub, *args: object) -> Result:
    return CliRunner().invoke(cli, ["--registry", str(hub.root), *map(str, args)])


def write(hub: Hub, text: str) -> Path:
    path = hub.root.parent / "run.yaml"
    path.write_text(text)
    return path


def test_a_merge_from_a_file_is_the_merge_from_the_command_line(hub: Hub) -> None:
    path = write(hub, "refs: [a, b]\nmethod: linear\nweights: [0.25, 0.75]\nname: filed\njson: true\n")
    filed = json.loads(invoke(hub, "merge", "--config", path).output)
    typed = json.loads(invoke(hub, "merge", "a", "b", "--weights", "0.25,0.75", "--name", "typed", "--json").output)
    assert filed["digest"] == typed["digest"]


def test_the_command_line_wins_and_adds(hub: Hub) -> None:
    path = write(hub, "refs: a\nname: filed\nrank: 2\n")
    assert invoke(hub, "merge", f"--config={path}", "b", "c", "--name", "typed", "--rank", "3").exit_code == 0
    record = hub.record("typed")
    assert [parent.ref for parent in record.spec.lineage.parents] == ["a@1", "b@1", "c@1"]
    assert record.spec.lineage.parameters["rank"] == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("refs: [a, b]\nname: x\nmehtod: soup\n", "'mehtod' is nothing that this command takes; it takes"),
        ("refs: [a, b]\nname: x\nmethod: yes\n", "method: got true, wanted a value"),
        ("refs: [a, b]\nname: {x: 1}\n", "name: got dict"),
        ("refs: [[a], b]\nname: x\n", "refs: got list"),
        ("- a\n", "got list, wanted keys"),
        ("a: [\n", "cannot be read"),
    ],
)
def test_a_file_that_is_none(text: str, said: str, hub: Hub) -> None:
    result = invoke(hub, "merge", "--config", write(hub, text))
    assert result.exit_code == 1
    assert said in result.stderr
    assert len(hub.index()) == 3


def test_a_file_that_is_missing_or_not_named(hub: Hub) -> None:
    assert "gone.yaml: cannot be read" in invoke(hub, "merge", "--config", "gone.yaml").stderr
    assert "needs the name of a file" in invoke(hub, "merge", "--config").stderr


def test_a_composition_from_a_file(tmp_path: Path) -> None:
    hub, base = Hub.create(tmp_path / "hub"), make_base(tmp_path / "base", seed=0)
    lines = [
        f"task: {TASK}",
        f"base: {base}",
        "name: low",
        "method: lora",
        "epochs: 1",
        "target: [query]",
        "bf16: false",
    ]
    result = invoke(hub, "train", "--config", write(hub, "\n".join(lines)))
    assert result.exit_code == 0, result.output
    assert all(path.endswith("query") for path in hub.record("low").spec.config.targets)
    path = write(hub, f"task: {TASK}\nrefs: [low]\nname: fused\nepochs: 1\nlearning_rate: 0.01\n")
    result = invoke(hub, "compose", "fusion", "--config", path)
    assert result.exit_code == 0, result.output
    assert hub.record("fused").spec.lineage.parameters["learning_rate"] == 0.01
