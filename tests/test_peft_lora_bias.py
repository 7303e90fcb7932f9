"""LoRA with biases against plain PEFT, both ways; mixed batches, merges and exports that keep them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from graftory import Adapter, Hub, LoraConfig, attach, new_adapter
from graftory.compose import export, merge
from graftory.config import LoraBiasConfig
from graftory.errors import CorruptAdapterError, MergeError, UnsupportedAdapterError
from tests.adapter_samples import shaken, task
from tests.conftest import tiny_batch, tiny_model
from tests.test_adapters_peft_trained import edited
from tests.test_peft_agreement import HEAD, TARGETS, logits

pytestmark = [
    # PEFT's own remarks about what it makes and saves
    pytest.mark.filterwarnings("ignore:.*have invalid shape"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but"),
]
CASES = [("none", True), ("lora_only", False), ("lora_only", True), ("all", True)]


def theirs(kind: str, bias: str, lora_bias: bool, **more: Any) -> Any:
    """A model with a LoRA that PEFT made, all of it moved."""
    values: dict[str, Any] = {"target_modules": TARGETS[kind], "modules_to_save": [HEAD[kind]], "bias": bias}
    config = peft.LoraConfig(r=3, lora_alpha=5, lora_bias=lora_bias, fan_in_fan_out=kind == "gpt2", **values | more)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(kind), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # a convolution's bias is none of those that graftory keeps
            if weight.requires_grad and "projection" not in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize(("bias", "lora_bias"), CASES)
def test_made_by_peft_gives_equal_logits_here(kind: str, bias: str, lora_bias: bool, tmp_path: Path) -> None:
    model = theirs(kind, bias, lora_bias)
    model.save_pretrained(str(tmp_path / "peft"))
    hub = Hub.create(tmp_path / "hub")
    ref = hub.add(tmp_path / "peft", name="theirs")
    adapter, expected = hub.get(ref), logits(model, kind)
    assert adapter.spec.method == "lora_bias"
    adapted = attach(tiny_model(kind), {"theirs": adapter})
    with adapted.route("theirs"):
        torch.testing.assert_close(logits(adapted, kind), expected, atol=1e-5, rtol=1e-5)
    out, again = hub.materialize(ref, tmp_path / "out"), hub.materialize(hub.put("again", adapter), tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    assert (again / "adapter_model.safetensors").read_bytes() == (out / "adapter_model.safetensors").read_bytes()


def ours(kind: str, bias: Any, lora_bias: bool, seed: int = 4) -> Adapter:
    config = LoraBiasConfig(rank=3, alpha=5.0, bias=bias, lora_bias=lora_bias)
    return shaken(new_adapter(tiny_model(kind), config, task=task(2)), seed)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize(("bias", "lora_bias"), [("all", True), ("lora_only", False)])
def test_made_here_loads_in_plain_peft(kind: str, bias: str, lora_bias: bool, tmp_path: Path) -> None:
    adapter = ours(kind, bias, lora_bias)
    hub = Hub.create(tmp_path / "hub")
    folder = hub.materialize(hub.put("ours", adapter), tmp_path / "peft")
    adapted = attach(tiny_model(kind), {"ours": adapter})
    extracted = adapted.extract("ours").tensors
    assert extracted.keys() == adapter.tensors.keys()
    assert all(torch.equal(value, extracted[key]) for key, value in adapter.tensors.items())
    with adapted.route("ours"):
        here = logits(adapted, kind)
    loaded = peft.PeftModel.from_pretrained(tiny_model(kind), str(folder)).eval()
    torch.testing.assert_close(here, logits(loaded, kind), atol=1e-5, rtol=1e-5)


def batched(model: Any) -> Tensor:
    output: Tensor = model(**tiny_batch("bert")).logits
    return output


def test_rows_of_a_mixed_batch_are_what_they_are_alone_with_gradients() -> None:
    adapters = {
        "all": ours("bert", "all", lora_bias=True, seed=1),
        "own": ours("bert", "lora_only", lora_bias=False, seed=2),
        "plain": shaken(new_adapter(tiny_model("bert"), LoraConfig(rank=2), task=task(2)), seed=3),
    }
    adapted = attach(tiny_model("bert").double(), adapters, check_base=False).double()
    adapted.train_only(*adapters)
    rows = ["all", None, "own", "plain", "all", "own", None, "plain"]
    with adapted.route(rows):
        mixed = batched(adapted)
    mixed.square().sum().backward()
    together = {
        name: {k: w.grad.clone() for k, w in adapted.weights(name).items() if w.grad is not None} for name in adapters
    }
    adapted.zero_grad()
    for name in (*adapters, None):
        picked = [number for number, row in enumerate(rows) if row == name]
        with adapted.route(name):
            alone = batched(adapted)[picked]
        torch.testing.assert_close(mixed[picked], alone, atol=1e-9, rtol=1e-9)
        if name is not None:
            alone.square().sum().backward()
            for key, weight in adapted.weights(name).items():
                torch.testing.assert_close(together[name][key], weight.grad, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(("bias", "lora_bias"), CASES)
def test_identity_merge_and_export_keep_the_logits(bias: str, lora_bias: bool) -> None:
    base, adapter = tiny_model("bert"), ours("bert", bias, lora_bias)
    exported = batched(export(base, adapter).eval())
    merged = merge([adapter], weights=[1.0], base=base)
    adapted = attach(base, {"ours": adapter, "merged": merged})
    with torch.no_grad():
        with adapted.route("ours"):
            expected = batched(adapted)
        with adapted.route("merged"):
            torch.testing.assert_close(batched(adapted), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(exported, expected, atol=1e-5, rtol=1e-5)


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
BROKEN: list[tuple[dict[str, Any], dict[str, Tensor | None], type[Exception], str]] = [
    ({"bias": "none"}, {}, CorruptAdapterError, "says bias = 'none'"),
    ({"lora_bias": False}, {}, CorruptAdapterError, "no lora_bias"),
    ({"use_dora": True}, {}, UnsupportedAdapterError, "with use_dora"),
    ({}, {f"{QUERY}.lora_B.bias": torch.ones(31)}, CorruptAdapterError, r"wanted \(32,\)"),
    ({}, {f"{QUERY}.base_layer.bias": torch.ones(31)}, CorruptAdapterError, r"wanted \(32,\)"),
    ({}, {"base_model.model.bert.pooler.dense.bias": torch.ones(32)}, CorruptAdapterError, "'lora_only'"),
    ({}, {f"{QUERY}.base_layer.weight": torch.ones(32, 32)}, UnsupportedAdapterError, "base_layer.weight"),
]


@pytest.mark.parametrize(("config", "tensors", "error", "text"), BROKEN, ids=[row[3] for row in BROKEN])
def test_broken_files_are_refused(
    config: dict[str, Any], tensors: dict[str, Tensor | None], error: type[Exception], text: str, tmp_path: Path
) -> None:
    theirs("bert", "lora_only", lora_bias=True).save_pretrained(str(tmp_path / "peft"))
    hub = Hub.create(tmp_path / "hub")
    with pytest.raises(error, match=text):
        hub.add(edited(tmp_path / "peft", config, tensors), name="broken")
    assert hub.index() == ()


def test_what_cannot_hold_a_bias_is_said(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="cannot hold what the lora_bias adapter adds to one"):
        export(tiny_model("llama"), ours("llama", "none", lora_bias=True))
    model = theirs("vit", "all", lora_bias=False)
    model.save_pretrained(str(tmp_path / "peft"))
    adapter = Hub.create(tmp_path / "hub")
    ref = adapter.add(tmp_path / "peft", name="theirs")
    with pytest.raises(UnsupportedAdapterError, match="Conv2d; graftory changes biases of linear layers"):
        attach(tiny_model("vit"), {"theirs": adapter.get(ref)})
