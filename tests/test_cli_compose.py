"""`hub compose` on a tiny random BERT and the committed example task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from graftory import Hub
from graftory.cli import cli
from graftory.commands.compose import SUBCOMMANDS
from tests.test_cli_train import TASK, make_base

QUICK = ("--epochs", "1", "--batch-size", "16")


def invoke(root: Path, *args: object) -> Result:
    return CliRunner().invoke(cli, ["--registry", str(root), *map(str, args)])


def run(root: Path, *args: object) -> Result:
    result = invoke(root, *args)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub with a LoRA, a bottleneck, and a fusion of both."""
    folder = tmp_path_factory.mktemp("compose")
    hub, base = folder / "hub", make_base(folder / "base", seed=0)
    Hub.create(hub)
    for name, method in (("low", "lora"), ("neck", "bottleneck")):
        run(hub, "train", TASK, "--base", base, "--method", method, "--name", name, *QUICK)
    printed = run(hub, "compose", "fusion", TASK, "low", "neck", "--name", "fused", *QUICK, "--regularisation", "0.02")
    assert printed.output.startswith("fused low@1, neck@1 into fused@1 on ")
    return hub


def test_the_fusion_is_a_version_with_parents(root: Path) -> None:
    record = Hub.open(root).record("fused")
    assert [(parent.ref, parent.relation) for parent in record.spec.lineage.parents] == [
        ("low@1", "composed"),
        ("neck@1", "composed"),
    ]
    parameters = record.spec.lineage.parameters
    assert (parameters["method"], parameters["regularisation"], parameters["epochs"]) == ("fusion", 0.02, 1.0)
    assert record.spec.metrics[0].name == "accuracy"
    assert "places=6, sources=2" in run(root, "show", "fused").output
    log = run(root, "log", "fused").output
    assert "low@1" in log
    assert "neck@1" in log


def test_eval_and_predict_take_it(root: Path) -> None:
    (first, *_) = json.loads(run(root, "eval", "fused", "low", "--json").output)
    assert first["metric"]["value"] == Hub.open(root).record("fused").spec.metrics[0].value
    (answer,) = json.loads(run(root, "predict", "fused", "my card is charged", "--json").output)
    assert sum(answer["probabilities"].values()) == pytest.approx(1)


def test_attention_as_a_table_json_and_a_picture(root: Path, tmp_path: Path) -> None:
    picture = tmp_path / "attention.png"
    text = run(root, "compose", "attention", "fused", "--rows", "8", "--picture", picture).output
    assert "8 rows of test" in text
    assert "low@1" in text.splitlines()[1]
    assert picture.read_bytes().startswith(b"\x89PNG")
    (table,) = json.loads(run(root, "compose", "attention", "fused", "--rows", "8", "--json").output)
    assert table["sources"] == ["low@1", "neck@1"]
    assert {place["track"] for place in table["places"]} == {"lora", "serial"}
    # low sits on q and v, neck behind the FFN: nowhere do they meet
    assert all(sorted(place["weights"], key=str) == [1.0, None] for place in table["places"])


def test_leave_one_out(root: Path) -> None:
    text = run(root, "compose", "leave-one-out", "fused", "--rows", "8").output
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["without", "nothing", "low@1", "neck@1"]
    found = json.loads(run(root, "compose", "leave-one-out", "fused", "--rows", "8", "--json").output)
    assert [row["without"] for row in found["leave_one_out"]] == ["low@1", "neck@1"]
    result = invoke(root, "compose", "leave-one-out", "low")
    assert result.exit_code == 1
    assert "wanted a fusion of two or more" in result.output


def test_what_does_not_fit_is_said_in_one_line(root: Path, tmp_path: Path) -> None:
    cases: list[tuple[tuple[object, ...], str]] = [
        (("compose", "fusion", TASK, "low", "low@1", "--name", "x"), "low@1 is the same adapter as low@1"),
        (("compose", "fusion", TASK, "nothing", "--name", "x"), "nothing"),
        (("compose", "fusion", TASK, "fused", "--name", "x"), "a fusion adapter cannot be fused"),
        (("compose", "fusion", TASK, "low", "--name", "x", "--dropout", "2"), "dropout: got 2.0"),
        (("compose", "attention", "low"), "wanted a fusion"),
        (("export", "fused", tmp_path / "plain"), "export a lora adapter"),
        (("merge", "fused", "--name", "x"), "cannot merge fusion adapters"),
    ]
    for args, text in cases:
        result = invoke(root, *args)
        assert result.exit_code == 1, args
        assert text in result.output
        assert len(result.output.strip().splitlines()) == 1
    assert "x" not in {row.name for row in Hub.open(root).index()}


def test_train_does_not_offer_what_compose_makes(root: Path) -> None:
    result = invoke(root, "train", TASK, "--method", "fusion")
    assert result.exit_code == 2
    assert "'fusion' is not one of" in result.output


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_help_with_an_example(name: str) -> None:
    result = CliRunner().invoke(cli, ["compose", name, "--help"], prog_name="hub")
    assert f"hub compose {name}" in result.output.split("Example:")[1]
    assert result.output.split("\n\n")[1].strip().startswith(SUBCOMMANDS[name])
