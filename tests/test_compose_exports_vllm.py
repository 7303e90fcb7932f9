"""Files for vLLM, read as its loader reads them, and by plain PEFT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel

from graftory.adapter import Adapter
from graftory.cli import cli
from graftory.compose.exports.vllm import export_vllm
from graftory.config import AdapterConfig, BitfitConfig, BottleneckConfig, DoraConfig, LoraConfig
from graftory.errors import UnsupportedAdapterError
from graftory.hub import Hub
from tests.adapter_samples import make
from tests.conftest import tiny_batch, tiny_model
from tests.vllm_loader import load

# transformers 5.23 warns of a name that PEFT 0.21 still uses
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def mixed(model: Any, rslora: bool) -> Adapter:
    """Three ranks and three scales."""
    paths = make(model, LoraConfig(rank=3, targets=("all",))).spec.config.targets
    config = LoraConfig(
        rank=3,
        alpha=5.0,
        rslora=rslora,
        targets=("all",),
        rank_pattern={paths[0]: 9, paths[3]: 1},
        alpha_pattern={paths[0]: 2.0, paths[5]: -7.0},
    )
    return make(model, config)


@pytest.mark.parametrize(
    ("config", "rank"),
    [(LoraConfig(rank=4, alpha=6), 8), (LoraConfig(rank=16, alpha=3, rslora=True), 16), (LoraConfig(rank=17), 32)],
)
def test_the_update_stays_the_same_at_a_rank_that_a_server_has(tmp_path: Path, config: LoraConfig, rank: int) -> None:
    model = tiny_model("llama")
    adapter = make(model, config)
    folder = export_vllm(adapter, tmp_path / "out", base="served")
    found = load(folder, rank, model)
    own = adapter.spec.config
    assert isinstance(own, LoraConfig)
    assert set(found) == set(own.targets)
    for path, delta in found.items():
        a, b = (adapter.tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
        torch.testing.assert_close(delta, own.scale_of(path) * b @ a, rtol=1e-12, atol=1e-12)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "served"
    if rank > 8:
        with pytest.raises(ValueError, match="greater than max_lora_rank"):
            load(folder, 8, model)


@pytest.mark.parametrize("rslora", [False, True])
def test_several_ranks_and_scales_become_one(tmp_path: Path, rslora: bool) -> None:
    model = tiny_model("llama")
    adapter = mixed(model, rslora)
    found = load(export_vllm(adapter, tmp_path / "out"), 16, model)
    own = adapter.spec.config
    assert isinstance(own, LoraConfig)
    assert len({own.scale_of(path) for path in own.targets}) == 4
    for path, delta in found.items():
        a, b = (adapter.tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
        torch.testing.assert_close(delta, own.scale_of(path) * b @ a, rtol=1e-6, atol=1e-6)


def test_plain_peft_loads_the_same_files(tmp_path: Path) -> None:
    from graftory.adapters import attach

    adapter = mixed(tiny_model("llama"), False)
    export_vllm(adapter, tmp_path / "out")
    batch = tiny_batch("llama")
    adapted = attach(tiny_model("llama"), {"a": adapter})
    with torch.no_grad(), adapted.route("a"):
        wanted = adapted(**batch).logits
    with torch.no_grad():
        got = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "out"))(**batch).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "config", "labels", "said"),
    [
        ("llama", DoraConfig(), 0, r"does not do DoRA .*hub export x@1 DIR"),
        ("qwen2", BitfitConfig(), 0, r"does not do biases"),
        ("llama", BottleneckConfig(), 0, r"vLLM serves LoRA, this is a bottleneck adapter; fold"),
        ("llama", LoraConfig(rank=2), 3, r"head of its own \(score\), vLLM takes no modules_to_save"),
        ("llama", LoraConfig(rank=257), 0, r"rank 257, vLLM 256 at the most; .*hub merge x@1 --rank 256"),
        ("bert", LoraConfig(rank=2), 0, r"is for bert, in which vLLM takes no LoRA"),
    ],
)
def test_what_vllm_refuses_is_refused_with_a_remedy(
    tmp_path: Path, kind: str, config: AdapterConfig, labels: int, said: str
) -> None:
    adapter = make(tiny_model(kind), config, labels=labels)
    with pytest.raises(UnsupportedAdapterError, match=said):
        export_vllm(adapter, tmp_path / "out", ref="x@1")
    assert not (tmp_path / "out").exists()


def test_modules_that_a_server_lacks_are_named(tmp_path: Path) -> None:
    """An adapter of the bare backbone: vLLM would look for layers.0..., find nothing and say nothing."""
    adapter = make(tiny_model("llama"), LoraConfig(rank=2))
    config = replace(adapter.spec.config, targets=tuple(t.removeprefix("model.") for t in adapter.spec.config.targets))
    bare = Adapter(
        replace(adapter.spec, config=config), {k.removeprefix("model."): t for k, t in adapter.tensors.items()}
    )
    with pytest.raises(
        UnsupportedAdapterError, match=r"changes layers\.0\.self_attn\.q_proj, vLLM takes model\.layers"
    ):
        export_vllm(bare, tmp_path / "out")


def test_the_command_writes_and_compares(tmp_path: Path) -> None:
    model = tiny_model("llama")
    hub = Hub.create(tmp_path / "hub")
    hub.put("org/plain", mixed(model, True))
    arguments = [
        "--registry",
        str(hub.root),
        "export",
        "org/plain",
        str(tmp_path / "out"),
        "--format",
        "vllm",
        "--json",
    ]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert (facts["format"], facts["rank"]) == ("vllm", 16)
    assert facts["max_difference"] < 1e-6
    assert set(load(tmp_path / "out", 16, model)) == set(hub.get("org/plain").spec.config.targets)
