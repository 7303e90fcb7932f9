"""Layouts for other programs: what is written is loaded by PEFT itself; what cannot be served is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel

from graftory import BottleneckConfig, LoraConfig
from graftory.adapters import attach
from graftory.cli import cli
from graftory.errors import ConfigError, UnsupportedAdapterError, VersionConflictError
from graftory.hub import Hub
from tests.adapter_samples import make
from tests.conftest import tiny_batch, tiny_model


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    model = tiny_model("llama")
    hub = Hub.create(tmp_path / "hub")
    hub.put("org/plain", make(model, LoraConfig(rank=4, alpha=6, targets=("all",))))
    hub.put("headed", make(model, LoraConfig(rank=4), labels=3))
    hub.put("neck", make(model, BottleneckConfig()))
    plain = make(model, LoraConfig(rank=4))
    several = LoraConfig(rank=4, targets=plain.spec.config.targets, alpha_pattern={plain.spec.config.targets[0]: 1.0})
    hub.put("scales", replace(plain, spec=replace(plain.spec, config=several)))
    return hub


@pytest.mark.parametrize("layout", ["peft", "vllm"])
def test_peft_loads_what_is_written(hub: Hub, tmp_path: Path, layout: str) -> None:
    folder = hub.write_layout("org/plain", tmp_path / "out", layout, served_base="served")
    assert folder == tmp_path / "out" / "org" / "plain"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["peft_type"]) == ("served", "LORA")
    assert not config["modules_to_save"]
    batch = tiny_batch("llama")
    adapted = attach(tiny_model("llama"), {"a": hub.get("org/plain")})
    with adapted.route("a"), torch.no_grad():
        wanted = adapted(**batch).logits
    with torch.no_grad():
        got = PeftModel.from_pretrained(tiny_model("llama"), str(folder))(**batch).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_the_weights_are_byte_for_byte_the_recorded_ones(hub: Hub, tmp_path: Path) -> None:
    hub.materialize("org/plain", tmp_path / "plain")
    folder = hub.write_layout("org/plain", tmp_path / "out", "peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize(
    ("ref", "layout", "said"),
    [
        ("headed", "vllm", r"head of its own.*hub export headed@1"),
        ("neck", "vllm", "vLLM serves LoRA, this is a bottleneck"),
        ("neck", "peft", "PEFT has no bottleneck"),
        ("scales", "vllm", r"several ranks or scales.*hub merge scales@1 --rank 4"),
    ],
)
def test_what_does_not_fit_is_refused(hub: Hub, tmp_path: Path, ref: str, layout: str, said: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=said):
        hub.write_layout(ref, tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_the_remedy_works(hub: Hub, tmp_path: Path) -> None:
    arguments = ["--registry", str(hub.root), "merge", "scales@1", "--rank", "4", "--name", "one-rank"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    hub.write_layout("one-rank", tmp_path / "out", "vllm")


def test_other_files_stay(hub: Hub, tmp_path: Path) -> None:
    folder = hub.write_layout("org/plain", tmp_path, "vllm", served_base="a")
    assert hub.write_layout("org/plain", tmp_path, "vllm", served_base="a") == folder
    with pytest.raises(VersionConflictError):
        hub.write_layout("org/plain", tmp_path, "vllm", served_base="b")
    with pytest.raises(ConfigError, match=r"no layout 'onnx'; there are peft, vllm"):
        hub.write_layout("org/plain", tmp_path, "onnx")


def test_pull_writes_a_layout(hub: Hub, tmp_path: Path) -> None:
    arguments = ["--registry", str(Hub.create(tmp_path / "here").root), "pull", f"{hub.root.as_uri()}/org/plain@1"]
    result = CliRunner().invoke(
        cli, [*arguments, "--layout", "vllm", "--served-base", "llama", "--to", str(tmp_path / "lora")]
    )
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "lora" / "org" / "plain" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "llama"
