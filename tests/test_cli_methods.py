"""`hub train --method M` for the methods of the second ring, and what can be done with what it makes."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
from click.testing import CliRunner, Result
from transformers import AutoModelForSequenceClassification

from graftory import Hub
from graftory.cli import cli
from tests.test_cli_train import TASK, as_json, assert_error, call, make_base, make_writer

METHODS = ("ia3", "bitfit", "dora", "prompt", "prefix")
LINEAR = ("ia3", "bitfit", "dora")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), seed=0)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub with an adapter of each method, named after it."""
    root = tmp_path_factory.mktemp("trained")
    Hub.create(root)
    common = ("train", TASK, "--base", base, "--max-steps", "6", "--batch-size", "8", "--learning-rate", "0.01")
    for method in METHODS:
        options = ("--length", "4") if method in ("prompt", "prefix") else ()
        result = call(root, *common, "--method", method, "--name", method, *options)
        assert result.exit_code == 0, result.output
    return root


def test_each_is_kept_with_its_metrics_and_has_learned(trained: Path) -> None:
    hub = Hub.open(trained)
    assert all(hub.get(method).spec.metrics for method in METHODS)
    for method in LINEAR:
        adapter = hub.get(method)
        assert adapter.spec.method == method
        start = 1.0 if method == "ia3" else 0.0
        part = {"ia3": "ia3_l", "bitfit": "bias_delta", "dora": "lora_B.weight"}[method]
        moved = [value for key, value in adapter.tensors.items() if key.endswith(part)]
        # a bias of the keys has no gradient: it shifts all logits of a softmax alike
        assert sum(bool((value - start).abs().max() > 1e-3) for value in moved) >= max(4, len(moved) - 2)


def test_they_are_measured_in_one_mixed_batch(trained: Path) -> None:
    hub = Hub.open(trained)
    for row in as_json(call(trained, "eval", *METHODS, "--json")):
        recorded = {metric.name: metric.value for metric in hub.record(row["ref"]).spec.metrics}
        assert row["metric"]["value"] == pytest.approx(recorded[row["metric"]["name"]], abs=1e-5)


@pytest.mark.parametrize("method", LINEAR)
def test_each_folds_into_one_plain_model(method: str, trained: Path, tmp_path: Path) -> None:
    result = as_json(call(trained, "export", method, tmp_path / "plain", "--json"))
    assert result["max_difference"] <= 1e-4
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").config.num_labels == 3


@pytest.mark.parametrize("method", ["ia3", "dora"])
def test_what_peft_knows_travels_in_its_layout(method: str, trained: Path, tmp_path: Path) -> None:
    Hub.create(tmp_path / "hub")
    address = f"{trained.as_uri()}/{method}@1"
    result = call(tmp_path / "hub", "pull", address, "--layout", "peft", "--to", tmp_path / "out")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / method / "adapter_config.json").read_text())
    assert config["peft_type"] == {"ia3": "IA3", "dora": "LORA"}[method]
    assert config.get("use_dora", False) is (method == "dora")
    result = call(tmp_path / "hub", "pull", f"{trained.as_uri()}/bitfit@1", "--layout", "peft", "--to", tmp_path)
    assert_error(result, "PEFT has no bitfit adapters")


def test_files_for_other_libraries_go_out_and_come_back(trained: Path, base: Path, tmp_path: Path) -> None:
    common = ("train", TASK, "--base", base, "--max-steps", "3", "--batch-size", "8")
    for name, options in {"low": ("--method", "lora"), "neck": ("--method", "bottleneck", "--size", "5")}.items():
        assert call(trained, *common, *options, "--name", name).exit_code == 0
        out = tmp_path / name
        assert as_json(call(trained, "export", name, out, "--format", "adapterhub", "--json"))["folder"] == str(out)
        files = {"adapter.safetensors", "adapter_config.json", "head_config.json", "model_head.safetensors"}
        assert {path.name for path in out.iterdir()} == files
        again = as_json(call(trained, "add", out, "--name", f"{name}-again", "--base", base, "--json"))["ref"]
        first, second = (as_json(call(trained, "eval", ref, "--task", TASK, "--json"))[0] for ref in (name, again))
        assert second["metric"]["value"] == pytest.approx(first["metric"]["value"], abs=1e-6)
    assert_error(call(trained, "export", "low", tmp_path / "low", "--format", "adapterhub"), "empty folder")
    assert_error(call(trained, "export", "ia3", tmp_path / "ia3", "--format", "adapterhub"), "lora or bottleneck can")
    result = call(trained, "export", "dora", tmp_path / "dora", "--format", "peft")
    assert result.output.splitlines()[-1] == f"wrote dora@1 to {tmp_path / 'dora'}, for peft"
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "dora")).use_dora
    assert_error(call(trained, "export", "neck", tmp_path / "neck2", "--format", "peft"), "PEFT has no bottleneck")


def test_options_of_other_methods_are_refused(trained: Path, base: Path) -> None:
    assert_error(call(trained, "train", TASK, "--base", base, "--method", "ia3", "--rank", "4"), "--rank", "not to ia3")


def test_a_base_without_biases_is_an_error_in_one_line(trained: Path, tmp_path: Path) -> None:
    llama = make_writer(tmp_path / "llama", "causal_lm")
    assert_error(call(trained, "train", TASK, "--base", llama, "--method", "bitfit"), "no biases outside of its head")


def test_help_names_the_methods() -> None:
    result: Result = CliRunner().invoke(cli, ["train", "--help"])
    assert all(method in result.output for method in METHODS)
