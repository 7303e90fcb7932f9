"""Prefix tuning: PEFT's own answers at PEFT's positions, mixed batches with gradients, generation, what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from graftory import Adapter, BottleneckConfig, Hub, LoraConfig, attach, export, new_adapter
from graftory.adapters import Row, is_adapted
from graftory.config import Ia3Config, PrefixConfig, PromptConfig
from graftory.errors import ConfigError, CorruptAdapterError, MergeError, RouteError, UnsupportedAdapterError
from tests.adapter_samples import logits, make, mixed_as_single
from tests.conftest import TINY, tiny_batch, tiny_model
from tests.test_adapters_prompt import writer

LENGTH, LAYERS = 3, 2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_logits_are_those_of_peft_at_its_positions(kind: str) -> None:
    """PEFT's prefix lies in the cache, so the text's positions begin behind it."""
    batch = tiny_batch(kind)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    theirs: Any = peft.get_peft_model(writer(kind), config).eval()
    weight = torch.randn(LENGTH, LAYERS * 2 * 32, generator=torch.Generator().manual_seed(4)).double()
    with torch.no_grad():
        theirs.prompt_encoder.default.embedding.weight.copy_(weight)
        expected = theirs(**batch).logits
    model = writer(kind)
    fresh = new_adapter(model, PrefixConfig(length=LENGTH))
    parts = weight.view(LENGTH, LAYERS, 2, 32)
    tensors = {
        f"{path}.{part}": parts[:, layer, which].contiguous()
        for layer, path in enumerate(fresh.spec.config.targets)
        for which, part in enumerate(PrefixConfig.parts)
    }
    assert tensors.keys() == fresh.tensors.keys()
    adapted = attach(model, {"prefix": replace(fresh, tensors=tensors)}, check_base=False)
    positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) + LENGTH
    with adapted.route("prefix"), torch.no_grad():
        found = adapted(**batch, position_ids=positions).logits
    with torch.no_grad():
        bare = model(**batch, position_ids=positions).logits
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-5, rtol=1e-5)
    assert (found[seen] - bare[seen]).abs().max() > 1e-2


def test_one_attention_in_closed_form() -> None:
    """softmax(q [P_k; K]ᵀ / √d) [P_v; V], head by head, with the padding masked."""
    model, batch = tiny_model("bert").double(), tiny_batch("bert")
    path = "bert.encoder.layer.0.attention.self"
    adapter = make(model, PrefixConfig(length=2, targets=(path,)), seed=1)
    adapter = replace(adapter, tensors={key: value.double() for key, value in adapter.tensors.items()})
    module, seen = model.get_submodule(path), []
    adapted = attach(model, {"a": adapter}, check_base=False)
    module.register_forward_hook(lambda _, args, out: seen.append((args[0], out[0])))
    with adapted.route("a"), torch.no_grad():
        logits(adapted, batch)
        x, out = seen[0]
        prefix = [adapter.tensors[f"{path}.{part}"].expand(8, -1, -1) for part in PrefixConfig.parts]
        q, k, v = (getattr(module, name)(x) for name in ("query", "key", "value"))
        k, v = (torch.cat([front, own], dim=1) for front, own in zip(prefix, (k, v), strict=True))
        heads = [each.view(8, -1, 4, 8).transpose(1, 2) for each in (q, k, v)]
        scores = heads[0] @ heads[1].transpose(2, 3) / 8**0.5
        visible = torch.cat([torch.ones(8, 2), batch["attention_mask"]], dim=1).bool()
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        expected = (scores.softmax(-1) @ heads[2]).transpose(1, 2).reshape(8, 10, 32)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)


ROWS: list[Row] = ["short", None, "long", "lora", "ia3", "short", "neck", "long", None]


def adapters_for(model: Any) -> dict[str, Adapter]:
    configs = {
        "short": PrefixConfig(length=2),
        "long": PrefixConfig(length=5),
        "lora": LoraConfig(rank=3, targets=("all",)),
        "ia3": Ia3Config(),
        "neck": BottleneckConfig(size=4),
    }
    made = {name: make(model, config, labels=2, seed=seed) for seed, (name, config) in enumerate(configs.items())}
    return {
        name: replace(each, tensors={key: value.double() for key, value in each.tensors.items()})
        for name, each in made.items()
    }


def test_mixed_batch_equals_single_runs_with_gradients(kind: str) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind, rows=len(ROWS))
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    adapted = attach(model.double(), adapters_for(model), check_base=False)
    adapted.train_only(*adapted.names)
    found = mixed_as_single(adapted, ROWS, batch, 1e-6)
    compared = sum("prefix" in name and bool(grad.abs().max() > 1e-6) for name, grad in found.items())
    assert compared >= 8


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_is_the_base_s_again_and_rows_without_prefixes_keep_their_bits(attention: str, kind: str) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    model.set_attn_implementation(attention)
    model.requires_grad_(False)
    bare, state = logits(model, batch), copy.deepcopy(model.state_dict())
    adapted = attach(model, {"a": make(model, PrefixConfig(length=3), labels=2), "b": make(model, LoraConfig())})
    assert is_adapted(model)
    assert torch.equal(logits(adapted, batch), bare)
    with adapted.route([None, "b"] * 4), torch.no_grad():
        assert torch.equal(logits(adapted, batch)[::2], bare[::2])
    with adapted.route("a"), torch.no_grad():
        assert (logits(adapted, batch) - bare).abs().max() > 1e-3
    adapted.remove("a")
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {
        attention
    }
    adapted.detach()
    assert torch.equal(logits(model, batch), bare)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_both_attentions_give_the_same() -> None:
    batch, found = tiny_batch("gpt2"), []
    for attention in ("sdpa", "eager"):
        model = tiny_model("gpt2")
        model.set_attn_implementation(attention)
        adapted = attach(model, {"a": make(model, PrefixConfig(length=3), labels=2)})
        with adapted.route(["a", None] * 4), torch.no_grad():
            found.append(logits(adapted, batch))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_keeps_each_row_s_prefix(beams: int) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    adapters = {f"p{length}": make(model, PrefixConfig(length=length, spread=2.0), seed=length) for length in (2, 4)}
    adapted = attach(model, adapters)
    ids = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(0))
    options = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    rows: list[Row] = ["p2", None, "p4"]
    with adapted.route(rows):
        mixed = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    for i, row in enumerate(rows):
        one = ids[i : i + 1]
        for cached in (True, False):
            with adapted.route([row]):
                single = adapted.generate(
                    input_ids=one, attention_mask=torch.ones_like(one), use_cache=cached, **options
                )
            assert torch.equal(mixed[i : i + 1], single)
    assert len({tuple(row[6:].tolist()) for row in mixed}) == 3


def test_a_row_takes_one_prefix_at_weight_one() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    other = make(model, PrefixConfig(length=2))
    half = replace(other, tensors={key: value.bfloat16() for key, value in other.tensors.items()})
    adapted = attach(
        model, {"a": other, "b": make(model, PrefixConfig(length=3)), "half": half, "l": make(model, LoraConfig())}
    )
    for mixture in ({"a": 0.5}, {"a": 1.0, "b": 1.0}, {"a": 1.0, "half": 1.0}):
        with adapted.route([mixture] * 8), pytest.raises(RouteError, match="a row takes one prefix adapter"):
            logits(adapted, batch)
    with adapted.route([{"a": 1.0, "l": 0.5}] * 8), torch.no_grad():
        logits(adapted, batch)


def test_it_stands_beside_a_prompt_in_one_row() -> None:
    model, batch = tiny_model("gpt2"), tiny_batch("gpt2")
    adapters = {"prefix": make(model, PrefixConfig(length=2), seed=1), "prompt": make(model, PromptConfig(length=3))}
    adapted = attach(model, adapters)
    rows: list[Row] = [{"prefix": 1.0, "prompt": 1.0}, "prefix", "prompt", None] * 2
    with adapted.route(rows), torch.no_grad():
        mixed = logits(adapted, batch)
    for i, row in enumerate(rows):
        with adapted.route([row]), torch.no_grad():
            one = logits(adapted, {key: value[i : i + 1] for key, value in batch.items()})
        torch.testing.assert_close(mixed[i], one[0], atol=1e-5, rtol=1e-5)


def test_an_attention_that_was_changed_under_way_is_noticed() -> None:
    model = tiny_model("bert")
    adapted = attach(model, {"a": make(model, PrefixConfig(length=2))})
    model.set_attn_implementation("eager")
    with adapted.route("a"), pytest.raises(RouteError, match="attn_implementation was changed"):
        logits(adapted, tiny_batch("bert"))


def test_what_cannot_be_is_refused() -> None:
    model = tiny_model("bert")
    with pytest.raises(UnsupportedAdapterError, match=r"'output\.dense' is no self-attention"):
        new_adapter(model, PrefixConfig(targets=("output.dense",)))
    with pytest.raises(ConfigError, match="length: got 0"):
        PrefixConfig(length=0)
    adapter = new_adapter(model, PrefixConfig())
    with pytest.raises(MergeError, match="keys and values in front"):
        export(model, adapter)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedAdapterError, match="attention of sdpa or eager, the base has 'flash_attention_2'"):
        attach(model, {"a": adapter})
    assert not is_adapted(model)


def test_targets_are_every_self_attention() -> None:
    for kind in TINY:
        count = 4 if kind == "t5" else 2
        assert len(new_adapter(tiny_model(kind), PrefixConfig()).spec.config.targets) == count
    one = new_adapter(tiny_model("bert"), PrefixConfig(targets=("layer.1.attention.self",)))
    assert one.spec.config.targets == ("bert.encoder.layer.1.attention.self",)


def test_a_hub_keeps_it_bit_for_bit(tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    adapter = make(tiny_model("qwen2"), PrefixConfig(length=3), labels=2)
    assert next(iter(adapter.tensors.values())).shape == (3, 16)
    back = hub.get(hub.put("mine", adapter))
    assert back.spec == adapter.spec
    assert all(torch.equal(back.tensors[key], value) for key, value in adapter.tensors.items())
    key = next(key for key in adapter.tensors if "prefix" in key)
    with pytest.raises(CorruptAdapterError, match="wanted"):
        hub.put("broken", replace(adapter, tensors={**adapter.tensors, key: torch.ones(2, 16)}))
