"""Plain PEFT is the oracle: adapters made there give the same logits here, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from graftory import Hub, LoraConfig, TaskInfo, attach, new_adapter
from tests.adapter_samples import shaken
from tests.conftest import tiny_batch, tiny_model

TARGETS = {
    "bert": ["query", "value", "intermediate.dense"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "t5": ["q", "v", "wo"],
    "vit": ["q_proj", "v_proj"],
}
HEAD = {"bert": "classifier", "gpt2": "score", "llama": "score", "t5": "classification_head", "vit": "classifier"}


def logits(model: Any, kind: str) -> Tensor:
    """In fp64: in fp32 the logits, up to 15, of either side are 1e-5 from that, and by how much is the CPU's affair."""
    model.double()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in tiny_batch(kind).items()}
    with torch.no_grad():
        output: Tensor = model(**batch).logits
    return output


@pytest.mark.parametrize("kind", list(TARGETS))
@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_made_by_peft_gives_equal_logits_here(kind: str, rslora: bool, tmp_path: Path) -> None:
    one = TARGETS[kind][-1]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=TARGETS[kind],
        modules_to_save=[HEAD[kind]],
        rank_pattern={one: 3},
        alpha_pattern={one: 5},
        use_rslora=rslora,
        fan_in_fan_out=kind == "gpt2",
        init_lora_weights=False,
    )
    torch.manual_seed(3)
    theirs = peft.get_peft_model(tiny_model(kind), config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "modules_to_save" in name:
                weight.add_(torch.randn(weight.shape))
    theirs.save_pretrained(str(tmp_path / "peft"))
    expected = logits(theirs, kind)

    hub = Hub.create(tmp_path / "hub")
    ref = hub.add(tmp_path / "peft", name="theirs")
    model = tiny_model(kind)
    bare = logits(model, kind)
    adapted = attach(model, {"theirs": hub.get(ref)})
    with adapted.route("theirs"):
        torch.testing.assert_close(logits(adapted, kind), expected, atol=1e-5, rtol=1e-5)
    assert (expected - bare).abs().max() > 1e-2


@pytest.mark.parametrize("kind", list(TARGETS))
@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_made_here_loads_in_plain_peft(kind: str, rslora: bool, tmp_path: Path) -> None:
    model = tiny_model(kind)
    config = LoraConfig(rank=4, alpha=6, rslora=rslora, targets=("all",))
    adapter = shaken(new_adapter(model, config, task=TaskInfo("t", "classification", ("no", "yes"))), seed=4)
    hub = Hub.create(tmp_path / "hub")
    folder = hub.materialize(hub.put("ours", adapter), tmp_path / "peft")
    adapted = attach(model, {"ours": adapter})
    with adapted.route("ours"):
        ours = logits(adapted, kind)
    theirs = peft.PeftModel.from_pretrained(tiny_model(kind), str(folder)).eval()
    torch.testing.assert_close(ours, logits(theirs, kind), atol=1e-5, rtol=1e-5)
    assert (ours - logits(tiny_model(kind), kind)).abs().max() > 1e-2


def test_files_from_peft_are_kept_byte_for_byte(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    peft.get_peft_model(tiny_model("bert"), config).save_pretrained(str(tmp_path / "peft"))
    hub = Hub.create(tmp_path / "hub")
    out = hub.materialize(hub.add(tmp_path / "peft", name="theirs"), tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
