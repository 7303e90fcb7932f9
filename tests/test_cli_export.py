"""Options of `hub export`, each with what it refuses, on a tiny random BERT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from graftory import Adapter, Hub
from graftory.adapters import attach
from graftory.config import AdapterConfig, BottleneckConfig, LoraConfig, PromptConfig
from graftory.training import LoadedBase, load_base
from tests.adapter_samples import make
from tests.conftest import tiny_model
from tests.test_cli_train import as_json, assert_error, call, make_base, save_tokenizer
from tests.test_compose_exports_widen import Int8Config, Int8Quantizer, quantised_base

METHODS: dict[str, AdapterConfig] = {
    "low": LoraConfig(rank=2),
    "neck": BottleneckConfig(size=4),
    "prompt": PromptConfig(length=2),
}
LINES = ("my card", "the parcel is not", "refund")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return load_base(str(make_base(tmp_path_factory.mktemp("base"), seed=0)), "classification")


@pytest.fixture(scope="module")
def root(base: LoadedBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub with an adapter of each method; none of them says which task it was trained on."""
    folder = tmp_path_factory.mktemp("hub")
    hub = Hub.create(folder)
    for name, config in METHODS.items():
        made = make(base.model, config, labels=3)
        hub.put(name, replace(made, spec=replace(made.spec, base=base.base)))
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(LINES))
    return file


def encoded(folder: Path) -> dict[str, Tensor]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(list(LINES), padding=True, return_tensors="pt"))


def wanted(base: LoadedBase, adapter: Adapter, batch: dict[str, Tensor]) -> Tensor:
    """Logits of base + adapter."""
    adapted = attach(base.model, {"a": adapter})
    try:
        with torch.no_grad(), adapted.route("a"):
            return adapted.eval()(**batch).logits.clone()  # type: ignore[no-any-return]
    finally:
        adapted.detach()


def logits_in(folder: Path, batch: dict[str, Tensor]) -> Tensor:
    """Logits of what transformers loads from a folder, in its own type."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**batch).logits  # type: ignore[no-any-return]


def test_a_graph_is_what_base_and_adapter_are(root: Path, base: LoadedBase, tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "graph"
    facts = as_json(call(root, "export", "neck", out, "--format", "pt2", "--input", texts, "--json"))
    assert (facts["format"], facts["files"], facts["rows"]) == ("pt2", ["model.pt2"], 3)
    assert facts["bytes"] == (out / "model.pt2").stat().st_size
    batch = encoded(out)
    names = ("input_ids", "attention_mask", "token_type_ids")
    got = torch.export.load(out / "model.pt2").module()(*(batch[name] for name in names if name in batch))
    assert (got - wanted(base, Hub.open(root).get("neck"), batch)).abs().max() < 1e-5
    assert facts["max_difference"] < 1e-5
    refused = call(root, "export", "prompt", tmp_path / "no", "--format", "pt2", "--input", texts)
    assert_error(refused, "a prompt adapter can be written neither as weights nor as a graph")
    assert_error(call(root, "export", "neck", tmp_path / "no", "--format", "pt2"), "pass --input with a file of texts")
    assert not (tmp_path / "no").exists()


def test_without_a_check_no_inputs_are_needed(root: Path, base: LoadedBase, tmp_path: Path, texts: Path) -> None:
    assert_error(call(root, "export", "low", tmp_path / "plain"), "does not say which task it was trained on")
    printed = call(root, "export", "low", tmp_path / "plain", "--no-check").output
    assert "not compared" in printed
    facts = as_json(call(root, "export", "low", tmp_path / "again", "--no-check", "--json"))
    assert (facts["max_difference"], facts["largest_logit"], facts["rows"]) == (None, None, 0)
    batch = encoded(tmp_path / "plain")
    assert (logits_in(tmp_path / "plain", batch) - wanted(base, Hub.open(root).get("low"), batch)).abs().max() < 1e-5
    for option in (("--input", texts), ("--rows", "2")):
        refused = call(root, "export", "low", tmp_path / "no", "--no-check", *option)
        assert_error(refused, f"{option[0]} and --no-check do not go together")


def test_weights_of_another_type(root: Path, base: LoadedBase, tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "half"
    facts = as_json(call(root, "export", "low", out, "--dtype", "bfloat16", "--input", texts, "--json"))
    tensors = load_file(out / "model.safetensors")
    assert facts["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    adapter = Hub.open(root).get("low")
    path = adapter.spec.config.targets[0]
    a, b = (adapter.tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
    assert isinstance(adapter.spec.config, LoraConfig)
    weight = base.model.get_submodule(path).weight.double() + adapter.spec.config.scale_of(path) * b @ a  # type: ignore[operator]
    assert torch.equal(tensors[f"{path}.weight"], weight.bfloat16())
    # compared in fp32: what differs is the rounding of weights
    assert 0 < facts["max_difference"] <= 8 * 2**-7 * facts["largest_logit"]
    result = call(root, "export", "low", tmp_path / "no", "--dtype", "int8")
    assert result.exit_code == 2
    assert "'int8' is not one of 'float32', 'bfloat16', 'float16'" in result.output


@pytest.fixture
def quantiser() -> Iterator[None]:
    register_quantization_config("int8-double")(Int8Config)
    register_quantizer("int8-double")(Int8Quantizer)
    yield
    del AUTO_QUANTIZATION_CONFIG_MAPPING["int8-double"]
    del AUTO_QUANTIZER_MAPPING["int8-double"]


def test_a_quantised_base_wants_the_option(tmp_path: Path, texts: Path, quantiser: None) -> None:
    model: Any = tiny_model("bert")
    meant = quantised_base(model, tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    adapter = make(model, LoraConfig(rank=2), labels=3)
    named = replace(adapter.spec.base, id=str(tmp_path / "base"))
    Hub.create(tmp_path / "hub").put("low", replace(adapter, spec=replace(adapter.spec, base=named)))
    arguments = ("export", "low", tmp_path / "plain", "--input", texts)
    assert_error(call(tmp_path / "hub", *arguments), "is quantised (int8-double)")
    assert_error(call(tmp_path / "hub", *arguments), "pass --dequantize")
    assert not (tmp_path / "plain").exists()
    facts = as_json(call(tmp_path / "hub", *arguments, "--dequantize", "--json"))
    assert facts["max_difference"] < 1e-5
    with torch.no_grad():
        for name, weight in meant.items():
            model.get_submodule(name).weight.copy_(weight)
    batch = encoded(tmp_path / "plain")
    adapted = attach(model, {"a": adapter}, check_base=False)
    with torch.no_grad(), adapted.route("a"):
        assert (logits_in(tmp_path / "plain", batch) - adapted.eval()(**batch).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("form", "option"),
    [
        ("pt2", ("--no-check",)),
        ("pt2", ("--dtype", "bfloat16")),
        ("pt2", ("--dequantize",)),
        ("peft", ("--max-shard-size", "2GB")),
        ("vllm", ("--rows", "3")),
        ("adapterhub", ("--head", "neck")),
    ],
)
def test_options_that_a_format_has_no_use_for(root: Path, tmp_path: Path, form: str, option: tuple[str, ...]) -> None:
    result = call(root, "export", "low", tmp_path / "no", "--format", form, *option)
    assert_error(result, f"{option[0]} and --format {form} do not go together; it is for --format model")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_written_names_what_is(root: Path, tmp_path: Path) -> None:
    result = call(root, "export", "low", tmp_path / "no", "--format", "onnx")
    assert result.exit_code == 2
    assert "ONNX is not written; --format pt2 writes base + adapter as one graph" in result.output
    assert "--format model one plain model" in result.output
    other = call(root, "export", "low", tmp_path / "no", "--format", "gguf")
    assert "'gguf' is not one of 'model', 'pt2', 'vllm', 'peft', 'adapterhub'" in other.output
