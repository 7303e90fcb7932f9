"""(IA)³ and DoRA against plain PEFT: made there and used here, made here and used there, over architectures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftory import AdapterConfig, Hub, attach, new_adapter
from graftory.config import DoraConfig, Ia3Config
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from tests.adapter_samples import shaken, task
from tests.conftest import tiny_batch, tiny_model
from tests.test_peft_agreement import HEAD, TARGETS, logits

FEEDFORWARD = {"bert": ["output.dense"], "gpt2": ["mlp.c_proj"], "llama": ["down_proj"], "t5": ["wo"], "vit": ["fc2"]}
"""The FFN's second layers; in BERT the end also fits the attention's output, as PEFT matches it."""
SCALED = {
    "bert": ["key", "value", "output.dense"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["k_proj", "v_proj", "down_proj"],
    "t5": ["k", "v", "wo"],
    "vit": ["k_proj", "v_proj", "fc2"],
}
METHODS = ("ia3", "dora")


def theirs(method: str, kind: str, **changes: Any) -> Any:
    """A model with an adapter that PEFT made, far from fresh."""
    values: dict[str, Any] = {"modules_to_save": [HEAD[kind]], "fan_in_fan_out": kind == "gpt2"}
    if method == "ia3":
        values |= {"target_modules": SCALED[kind], "feedforward_modules": FEEDFORWARD[kind]}
        config: peft.PeftConfig = peft.IA3Config(**values | changes)
    else:
        one = TARGETS[kind][-1]
        values |= {
            "r": 4,
            "lora_alpha": 12,
            "use_dora": True,
            "target_modules": TARGETS[kind],
            "rank_pattern": {one: 3},
        }
        config = peft.LoraConfig(**values | changes)
    model = peft.get_peft_model(tiny_model(kind), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("ia3_l", "lora_", "modules_to_save")):
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


OURS: dict[str, Callable[[], AdapterConfig]] = {
    "ia3": Ia3Config,
    "dora": lambda: DoraConfig(rank=3, alpha=5.0, rslora=True, targets=("all",)),
}


@pytest.mark.parametrize("kind", list(TARGETS))
@pytest.mark.parametrize("method", METHODS)
def test_made_by_peft_gives_equal_logits_here(method: str, kind: str, tmp_path: Path) -> None:
    model = theirs(method, kind)
    model.save_pretrained(str(tmp_path / "peft"))
    expected = logits(model, kind)
    hub = Hub.create(tmp_path / "hub")
    adapter = hub.get(hub.add(tmp_path / "peft", name="theirs"))
    assert adapter.spec.method == method
    bare = logits(tiny_model(kind), kind)
    adapted = attach(tiny_model(kind), {"theirs": adapter})
    with adapted.route("theirs"):
        torch.testing.assert_close(logits(adapted, kind), expected, atol=1e-5, rtol=1e-5)
    assert (expected - bare).abs().max() > 1e-2


@pytest.mark.parametrize("kind", list(TARGETS))
@pytest.mark.parametrize("method", METHODS)
def test_made_here_loads_in_plain_peft(method: str, kind: str, tmp_path: Path) -> None:
    adapter = shaken(new_adapter(tiny_model(kind), OURS[method](), task=task(2)), seed=4)
    hub = Hub.create(tmp_path / "hub")
    folder = hub.materialize(hub.put("ours", adapter), tmp_path / "peft")
    adapted = attach(tiny_model(kind), {"ours": adapter})
    with adapted.route("ours"):
        ours = logits(adapted, kind)
    loaded = peft.PeftModel.from_pretrained(tiny_model(kind), str(folder)).eval()
    torch.testing.assert_close(ours, logits(loaded, kind), atol=1e-5, rtol=1e-5)
    assert (ours - logits(tiny_model(kind), kind)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_peft(method: str, kind: str, tmp_path: Path) -> None:
    """DoRA's depend on whether the norms are a constant: with a graph through them they would differ."""
    model = theirs(method, kind, modules_to_save=None).double()
    model.save_pretrained(str(tmp_path / "peft"))
    hub = Hub.create(tmp_path / "hub")
    adapter = hub.get(hub.add(tmp_path / "peft", name="theirs"))
    adapted = attach(tiny_model(kind).double(), {"theirs": adapter}, check_base=False)
    adapted.train_only("theirs")
    with adapted.route("theirs"):
        batched(adapted, kind).square().sum().backward()
    batched(model, kind).square().sum().backward()
    named = {name.replace(".default", "").removesuffix(".weight"): weight for name, weight in model.named_parameters()}
    for name, weight in adapted.weights("theirs").items():
        assert weight.grad is not None
        expected = named[f"base_model.model.{name}".removesuffix(".weight")].grad
        largest = float(expected.abs().max())
        assert largest > 0 or "decoder" in name
        torch.testing.assert_close(weight.grad.double(), expected, atol=1e-5 * largest, rtol=1e-5)


def batched(model: Any, kind: str) -> Tensor:
    output: Tensor = model(**tiny_batch(kind)).logits
    return output


@pytest.mark.parametrize("method", METHODS)
def test_files_from_peft_are_kept_byte_for_byte(method: str, tmp_path: Path) -> None:
    theirs(method, "bert").save_pretrained(str(tmp_path / "peft"))
    hub = Hub.create(tmp_path / "hub")
    out = hub.materialize(hub.add(tmp_path / "peft", name="theirs"), tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_patterns_of_layers_and_regular_expressions_become_explicit_paths(method: str, tmp_path: Path) -> None:
    pattern = r".*layer\.1\.attention\.self\.(key|value)"
    changes: dict[str, Any] = {"feedforward_modules": r".*output\.dense"} if method == "ia3" else {"rank_pattern": {}}
    theirs(method, "bert", target_modules=pattern, **changes).save_pretrained(str(tmp_path / "peft"))
    hub = Hub.create(tmp_path / "hub")
    targets = hub.get(hub.add(tmp_path / "peft", name="theirs")).spec.config.targets
    assert targets == tuple(f"bert.encoder.layer.1.attention.self.{part}" for part in ("key", "value"))


def test_layers_to_transform_are_where_the_tensors_are(tmp_path: Path) -> None:
    changes = {"layers_to_transform": [1], "target_modules": ["query"], "rank_pattern": {}}
    theirs("dora", "bert", **changes).save_pretrained(str(tmp_path / "peft"))
    hub = Hub.create(tmp_path / "hub")
    targets = hub.get(hub.add(tmp_path / "peft", name="theirs")).spec.config.targets
    assert targets == ("bert.encoder.layer.1.attention.self.query",)


def edited(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor | None]) -> Path:
    """The folder, with keys of its configuration and tensors changed; None takes one out."""
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    held: dict[str, Any] = load_file(weights) | {f"base_model.model.{key}": value for key, value in tensors.items()}
    save_file({key: value for key, value in held.items() if value is not None}, weights)
    return folder


KEY = "bert.encoder.layer.0.attention.self.key"
QUERY = "bert.encoder.layer.0.attention.self.query"
BROKEN: list[tuple[str, dict[str, Any], dict[str, Tensor | None], type[Exception], str]] = [
    ("ia3", {"feedforward_modules": ["key"]}, {}, CorruptAdapterError, "feedforward_modules and the shape of"),
    ("ia3", {}, {f"{KEY}.ia3_l": torch.ones(32)}, UnsupportedAdapterError, r"\[out, 1\] or \[1, in\]"),
    ("ia3", {}, {f"{KEY}.other": torch.ones(32)}, UnsupportedAdapterError, "other"),
    ("ia3", {"a_feature_of_next_year": 1}, {}, UnsupportedAdapterError, "a_feature_of_next_year"),
    ("ia3", {"feedforward_modules": 3}, {}, CorruptAdapterError, "feedforward_modules"),
    ("dora", {}, {f"{QUERY}.lora_magnitude_vector": None}, CorruptAdapterError, "lora_magnitude_vector none"),
    ("dora", {}, {f"{QUERY}.lora_magnitude_vector": torch.ones(31)}, CorruptAdapterError, r"wanted \(32,\)"),
    ("dora", {"use_dora": False}, {}, UnsupportedAdapterError, "lora_magnitude_vector"),
    ("dora", {"bias": "lora_only"}, {}, UnsupportedAdapterError, "bias"),
]


@pytest.mark.parametrize(("method", "config", "tensors", "error", "text"), BROKEN, ids=[row[4] for row in BROKEN])
def test_broken_files_are_refused(
    method: str,
    config: dict[str, Any],
    tensors: dict[str, Tensor | None],
    error: type[Exception],
    text: str,
    tmp_path: Path,
) -> None:
    theirs(method, "bert").save_pretrained(str(tmp_path / "peft"))
    hub = Hub.create(tmp_path / "hub")
    with pytest.raises(error, match=text):
        hub.add(edited(tmp_path / "peft", config, tensors), name="broken")
    assert hub.index() == ()


def test_a_sidecar_of_another_method_is_refused(tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    adapter = new_adapter(tiny_model("bert"), DoraConfig())
    out = hub.materialize(hub.put("a", adapter), tmp_path / "out")
    sidecar = json.loads((out / "graftory.json").read_text())
    sidecar["spec"]["config"]["method"] = "lora"
    (out / "graftory.json").write_text(json.dumps(sidecar))
    with pytest.raises(CorruptAdapterError, match="the specification is of method 'lora'; wanted dora"):
        hub.add(out, name="b")
