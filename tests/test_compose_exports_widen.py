"""Bottlenecks as more hidden units of an FFN, and bases that are quantised."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from graftory.adapter import Adapter
from graftory.adapters import attach
from graftory.compose import export, export_folder, save_export
from graftory.config import BottleneckConfig, LoraConfig
from graftory.errors import MergeError
from tests.adapter_samples import make
from tests.conftest import tiny_model

IDS = torch.tensor([[3, 5, 7, 9], [4, 6, 8, 2]])


def adapted_logits(model: Any, adapter: Adapter) -> Tensor:
    adapted = attach(model, {"a": adapter})
    with torch.no_grad(), adapted.route("a"):
        logits: Tensor = adapted(input_ids=IDS).logits
    adapted.detach()
    return logits


def parallel(model: Any, **changes: Any) -> Adapter:
    """In the second layer alone, and a little noise on its scale."""
    act = getattr(model.config, "hidden_act", None) or model.config.activation
    return make(model, BottleneckConfig(placement="parallel", size=5, activation=act, scale=0.7, **changes), labels=3)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra"])
def test_a_wider_ffn_is_the_bottleneck_beside_it(tmp_path: Path, kind: str) -> None:
    model: Any = tiny_model(kind)
    model.save_pretrained(tmp_path / "base")
    adapter = parallel(model)
    done = export_folder(str(tmp_path / "base"), without_kind(adapter), tmp_path / "plain")
    loaded: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    wanted = adapted_logits(model, adapter)
    with torch.no_grad():
        got = loaded.eval()(input_ids=IDS).logits
    bare = model(input_ids=IDS).logits
    assert (adapted_logits(model, stilled(adapter)) - wanted).abs().max() > 1e-3
    assert bare.shape != wanted.shape
    assert (got - wanted).abs().max() < 1e-5
    name = "hidden_dim" if kind == "distilbert" else "intermediate_size"
    assert getattr(loaded.config, name) == getattr(model.config, name) + 5
    assert json.loads((tmp_path / "plain" / "graftory_export.json").read_text())["settings"] == {name: 53}
    save_export(export(model, adapter), None, tmp_path / "memory")
    streamed, kept = (load_file(tmp_path / each / "model.safetensors") for each in ("plain", "memory"))
    assert all(torch.equal(streamed[key], tensor) for key, tensor in kept.items())
    assert done.size == sum(tensor.nbytes for tensor in kept.values())


def without_kind(adapter: Adapter) -> Adapter:
    """The base has no tokenizer, which a task of texts asks for."""
    assert adapter.spec.task is not None
    return replace(adapter, spec=replace(adapter.spec, task=replace(adapter.spec.task, kind="classification")))


def stilled(adapter: Adapter) -> Adapter:
    """The same head on the base alone."""
    zero = {key: torch.zeros_like(t) if "adapter_up" in key else t for key, t in adapter.tensors.items()}
    return replace(adapter, tensors=zero)


def test_all_layers_are_as_wide_as_the_widest_and_the_rest_is_zero(tmp_path: Path) -> None:
    model: Any = tiny_model("bert")
    model.save_pretrained(tmp_path / "base")
    second = "bert.encoder.layer.1.output.dense"
    adapter = parallel(model, targets=("layer.1.output.dense",))
    assert adapter.spec.config.targets == (second,)
    plain: Any = export(model, adapter)
    assert plain.config.intermediate_size == 53
    first = plain.bert.encoder.layer[0]
    assert first.intermediate.dense.weight.shape == (53, 32)
    assert not first.intermediate.dense.weight[48:].any()
    assert not first.output.dense.weight[:, 48:].any()
    assert torch.equal(
        plain.bert.encoder.layer[1].intermediate.dense.weight[48:], adapter.tensors[f"{second}.adapter_down.weight"]
    )
    with torch.no_grad():
        got = plain(input_ids=IDS).logits
    assert (got - adapted_logits(model, adapter)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("bert", {"placement": "houlsby"}, "placed houlsby, wanted parallel"),
        ("bert", {"activation": "relu"}, "its activation is relu, the FFN's gelu"),
        ("gpt2", {"activation": "gelu_new"}, "in gpt2 it reads the stream before the norm, the FFN behind it"),
        ("t5", {"activation": "relu"}, "in t5 it reads the stream before the norm"),
        ("llama", {"activation": "silu"}, "the FFN is gated"),
    ],
)
def test_where_it_is_not_exact_it_is_refused(kind: str, fields: dict[str, Any], said: str) -> None:
    model: Any = tiny_model(kind)
    adapter = make(model, BottleneckConfig(**{"placement": "parallel", "activation": "gelu", **fields}))
    with pytest.raises(MergeError, match=rf"{said}.*--format pt2"):
        export(model, adapter)


class Int8Linear(nn.Module):
    """W = scale q, as quantised models keep it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(linear.weight.shape, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(linear.out_features, 1), requires_grad=False)
        self.bias = linear.bias


class Int8Config(QuantizationConfigMixin):
    def __init__(self, **_: Any) -> None:
        self.quant_method = "int8-double"  # type: ignore[assignment]


class Int8Quantizer(HfQuantizer):
    """A quantisation library of this file alone; transformers drives it as any other."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        for name in linears(model):
            set_module(model, name, Int8Linear(model.get_submodule(name)))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        del model

    def is_serializable(self) -> bool:
        return True

    def is_trainable(self) -> bool:
        return False

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, Int8Linear):
                linear = nn.Linear(module.weight.shape[1], module.weight.shape[0])
                linear.weight = nn.Parameter(module.scale * module.weight)
                linear.bias = module.bias
                set_module(model, name, linear)
        return model


def linears(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "query" in name]


def set_module(model: Any, name: str, module: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, module)


@pytest.fixture
def int8() -> Iterator[None]:
    register_quantization_config("int8-double")(Int8Config)
    register_quantizer("int8-double")(Int8Quantizer)
    yield
    del AUTO_QUANTIZATION_CONFIG_MAPPING["int8-double"]
    del AUTO_QUANTIZER_MAPPING["int8-double"]


def quantised_base(model: Any, folder: Path) -> dict[str, Tensor]:
    """Save a model with its queries in int8; the numbers that they stand for."""
    from safetensors.torch import save_file

    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    meant = {}
    for name in linears(model):
        weight = tensors.pop(f"{name}.weight")
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors |= {f"{name}.weight": (weight / scale).round().to(torch.int8), f"{name}.scale": scale}
        meant[name] = scale * tensors[f"{name}.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "int8-double"}}))
    return meant


def test_a_quantised_base_is_refused_and_dequantised_on_request(tmp_path: Path, int8: None) -> None:
    model: Any = tiny_model("bert")
    adapter = make(model, LoraConfig(rank=2, alpha=4.0))
    meant = quantised_base(model, tmp_path / "base")
    with pytest.raises(MergeError, match=r"is quantised \(int8-double\).*pass --dequantize"):
        export_folder(str(tmp_path / "base"), adapter, tmp_path / "plain")
    done = export_folder(
        str(tmp_path / "base"), adapter, tmp_path / "plain", dequantize=True, batches=[{"input_ids": IDS}]
    )
    assert done.check is not None
    assert done.check.max_difference < 1e-5
    loaded: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert not hasattr(loaded.config, "quantization_config")
    for name, weight in meant.items():
        a, b = (adapter.tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
        wanted = (weight.double() + 2.0 * b @ a).float()
        torch.testing.assert_close(loaded.get_submodule(name).weight, wanted, atol=1e-6, rtol=0)
    assert "the base was quantised" in (tmp_path / "plain" / "README.md").read_text()


def test_a_model_in_memory_that_is_quantised_is_refused_too() -> None:
    model: Any = tiny_model("bert")
    adapter = make(model, LoraConfig(rank=2))
    model.config.quantization_config = {"quant_method": "awq", "bits": 4}
    with pytest.raises(MergeError, match=r"is quantised \(awq\).*dequantize=True"):
        export(model, adapter)


def test_a_library_that_is_not_there_is_named(tmp_path: Path) -> None:
    model: Any = tiny_model("bert")
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    quantised = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    adapter = make(model, LoraConfig(rank=2))
    with pytest.raises(MergeError, match=r"cannot be dequantised from hqq .*install"):
        export_folder(str(tmp_path / "base"), adapter, tmp_path / "plain", dequantize=True)
    assert not (tmp_path / "plain").exists()
