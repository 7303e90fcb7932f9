"""UniPELT against a BERT that is written out here, with the formulas of LoRA, prefixes, bottlenecks and gates in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from graftory import Adapter, AdapterConfig, BottleneckConfig, Hub, LoraConfig, attach, export, new_adapter
from graftory.config import PrefixConfig, PromptConfig, UnipeltConfig
from graftory.errors import ConfigError, CorruptAdapterError, MergeError, RouteError, UnsupportedAdapterError
from graftory.hub.codecs import codec_of
from tests.adapter_samples import logits, make, mixed_as_single
from tests.conftest import tiny_batch, tiny_model

CONFIG = UnipeltConfig(rank=3, alpha=6.0, length=4, size=5, activation="gelu")
ENCODERS = ("bert", "roberta", "distilbert", "vit")


def doubled(adapter: Adapter) -> Adapter:
    return replace(adapter, tensors={key: value.double() for key, value in adapter.tensors.items()})


def written_out(model: Any, adapter: Adapter, batch: dict[str, Tensor]) -> Tensor:
    """The logits of a BERT with the adapter, by the paper's formulas, layer by layer."""
    t, mask = adapter.tensors, batch["attention_mask"].double()
    bert, config = model.bert, model.config
    h = bert.embeddings(input_ids=batch["input_ids"])
    heads = config.num_attention_heads

    def gate(path: str, x: Tensor) -> Tensor:
        each = torch.sigmoid(x @ t[f"{path}.gate.weight"] + t[f"{path}.gate.bias"])
        return ((each * mask).sum(1) / mask.sum(1))[:, None, None]

    def low(path: str, x: Tensor) -> Tensor:
        update: Tensor = gate(path, x) * 2.0 * (x @ t[f"{path}.lora_A.weight"].T @ t[f"{path}.lora_B.weight"].T)
        return update

    def split(x: Tensor) -> Tensor:
        each: Tensor = x.unflatten(-1, (heads, -1))
        return each.transpose(1, 2)

    for number, layer in enumerate(bert.encoder.layer):
        path = f"bert.encoder.layer.{number}"
        here = f"{path}.attention.self"
        own = layer.attention.self
        q, k = own.query(h) + low(f"{here}.query", h), own.key(h)
        v = own.value(h) + low(f"{here}.value", h)
        front = [gate(here, h) * t[f"{here}.prefix_{name}"] for name in ("keys", "values")]
        k, v = torch.cat([front[0], k], 1), torch.cat([front[1], v], 1)
        scores = split(q) @ split(k).transpose(-1, -2) / (q.shape[-1] // heads) ** 0.5
        hidden = functional.pad(1 - mask, (CONFIG.length, 0))[:, None, None] * -1e9
        mixed = ((scores + hidden).softmax(-1) @ split(v)).transpose(1, 2).flatten(2)
        h = layer.attention.output.LayerNorm(layer.attention.output.dense(mixed) + h)
        end = f"{path}.output.dense"
        u = layer.output.dense(layer.intermediate(h))
        inner = functional.gelu(u @ t[f"{end}.adapter_down.weight"].T + t[f"{end}.adapter_down.bias"])
        more = inner @ t[f"{end}.adapter_up.weight"].T + t[f"{end}.adapter_up.bias"]
        h = layer.output.LayerNorm(u + gate(end, u) * more + h)
    pooled = bert.pooler(h)
    logits: Tensor = pooled @ t["classifier.weight"].T + t["classifier.bias"]
    return logits


def test_it_is_the_paper_written_out() -> None:
    model, batch = tiny_model("bert").double(), tiny_batch("bert")
    adapter = doubled(make(model, CONFIG, labels=3))
    adapted = attach(model, {"it": adapter}, check_base=False)
    with adapted.route("it"), torch.no_grad():
        found = logits(adapted, batch)
    with torch.no_grad():
        torch.testing.assert_close(found, written_out(model, adapter, batch), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("kind", ENCODERS)
def test_mixed_batch_beside_others_equals_single_runs_with_gradients(kind: str) -> None:
    model, batch = tiny_model(kind).double(), tiny_batch(kind, rows=8)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    configs: dict[str, AdapterConfig] = {
        "one": CONFIG,
        "two": replace(CONFIG, rank=2, length=6, size=7, activation="relu"),
        "prefix": PrefixConfig(length=3),
        "lora": LoraConfig(rank=2),
        "neck": BottleneckConfig(size=6, placement="houlsby"),
    }
    made = {name: doubled(make(model, config, seed=seed)) for seed, (name, config) in enumerate(configs.items())}
    adapted = attach(model, made, check_base=False)
    adapted.train_only(*adapted.names)
    mixed_as_single(adapted, [*made, None, {"one": 1.0, "lora": 0.5}, "one"], batch, 1e-9)


def test_padding_changes_no_gate() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapted = attach(model, {"it": make(model, CONFIG, labels=2)})
    wider = {key: functional.pad(value, (0, 5)) for key, value in batch.items()}
    with adapted.route("it"), torch.no_grad():
        torch.testing.assert_close(logits(adapted, wider), logits(adapted, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_it_comes_back_bit_for_bit_and_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    bare = logits(model, batch)
    stored = make(model, CONFIG, labels=2)
    hub = Hub.create(tmp_path)
    back = hub.get(hub.put("one", stored))
    assert back.spec == stored.spec
    adapted = attach(model, {"stored": back})
    out = adapted.extract("stored")
    assert out.spec == stored.spec
    assert out.tensors.keys() == stored.tensors.keys()
    assert all(torch.equal(out.tensors[key], value) for key, value in stored.tensors.items())
    adapted.detach()
    assert torch.equal(logits(model, batch), bare)


def test_gates_start_at_a_half_and_the_rest_as_its_own_methods() -> None:
    adapter = new_adapter(tiny_model("bert"), CONFIG)
    gates = [value for key, value in adapter.tensors.items() if ".gate." in key]
    assert len(gates) == 2 * len(adapter.spec.config.targets) == 2 * 2 * 4
    assert not any(gate.any() for gate in gates)
    zeros = [value for key, value in adapter.tensors.items() if key.endswith(("lora_B.weight", "adapter_up.weight"))]
    assert len(zeros) == 2 * 3
    assert not any(value.any() for value in zeros)


def test_what_is_refused() -> None:
    for kind in ("gpt2", "t5", "llama"):
        with pytest.raises(UnsupportedAdapterError, match="token by token"):
            new_adapter(tiny_model(kind), CONFIG)
    model, batch = tiny_model("bert"), tiny_batch("bert")
    with pytest.raises(UnsupportedAdapterError, match="leave the targets out"):
        new_adapter(model, replace(CONFIG, targets=("query",)))
    with pytest.raises(ConfigError, match="rank: got 0"):
        UnipeltConfig(rank=0)
    adapter = make(model, CONFIG)
    with pytest.raises(MergeError, match="non-linearity"):
        export(model, adapter)
    adapted = attach(model, {"it": adapter, "prompt": make(model, PromptConfig(length=2))})
    with pytest.raises(RouteError, match="soft prompts"), adapted.route(["it", "prompt"] * 4):
        logits(adapted, batch)
    with pytest.raises(RouteError, match="weight"), adapted.route([{"it": 0.5}] * 8):
        logits(adapted, batch)
    codec = codec_of(adapter.spec)
    for part in ("gate.weight", "lora_A.weight", "prefix_keys", "adapter_down.bias"):
        key = next(key for key in adapter.tensors if key.endswith(part))
        lacking = {other: value for other, value in adapter.tensors.items() if other != key}
        with pytest.raises(CorruptAdapterError, match="shapes"):
            codec.check(codec.encode(replace(adapter, tensors=lacking)), adapter.spec)
