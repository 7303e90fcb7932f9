"""Compacter and KronA against bottlenecks and linear layers whose weights are written out with `torch.kron`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftory import Adapter, AdapterConfig, BottleneckConfig, Hub, LoraConfig, attach, export, merge, new_adapter
from graftory.adapters.expansions import as_bottleneck
from graftory.config import CompacterConfig, KronaConfig, Placement
from graftory.errors import ConfigError, CorruptAdapterError, UnsupportedAdapterError
from graftory.hub.codecs import codec_of
from tests.adapter_samples import PLACEMENTS, logits, make, mixed_as_single
from tests.conftest import tiny_batch, tiny_model

NEW: dict[str, AdapterConfig] = {
    "compact": CompacterConfig(size=8, division=4, activation="gelu", spread=1.0),
    "beside": CompacterConfig(size=4, division=2, factor_rank=2, placement="parallel", scale=2.0, spread=1.0),
    "behind": CompacterConfig(size=8, placement="houlsby", spread=1.0),
    "krona": KronaConfig(factor=4, strength=0.75),
    "krona-all": KronaConfig(factor=8, targets=("all",)),
}


def doubled(adapter: Adapter) -> Adapter:
    return replace(adapter, tensors={key: value.double() for key, value in adapter.tensors.items()})


def written_out(adapter: Adapter) -> Adapter:
    """A compacter as a bottleneck by the paper's formula, entry by entry of the sum: Σ_i A_i ⊗ (s_i t_i)."""
    config, tensors = adapter.spec.config, adapter.tensors
    assert isinstance(config, CompacterConfig)
    rule = tensors[f"{config.targets[0]}.phm_rule"]
    dense: dict[str, Tensor] = dict(adapter.head_tensors())
    for path in config.targets:
        for side in ("down", "up"):
            left, right = (tensors[f"{path}.phm_{side}_{part}"] for part in ("left", "right"))
            terms = [torch.kron(rule[i].contiguous(), left[i] @ right[i]) for i in range(config.division)]
            dense[f"{path}.adapter_{side}.weight"] = torch.stack(terms).sum(0)
            dense[f"{path}.adapter_{side}.bias"] = tensors[f"{path}.adapter_{side}.bias"]
    plain = BottleneckConfig(
        targets=config.targets,
        placement=config.placement,
        size=config.size,
        activation=config.activation,
        scale=config.scale,
    )
    return Adapter(replace(adapter.spec, config=plain), dense)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_compacter_is_the_bottleneck_of_its_products(placement: Placement, kind: str) -> None:
    model, batch = tiny_model(kind).double(), tiny_batch(kind)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    config = CompacterConfig(size=8, placement=placement, activation="gelu", factor_rank=2, scale=1.5)
    adapter = doubled(make(model, config, labels=3))
    adapters = {"compact": adapter, "dense": written_out(adapter), "made": as_bottleneck(adapter)}
    adapted = attach(model, adapters, check_base=False)
    found = {}
    for name in adapters:
        with adapted.route(name), torch.no_grad():
            found[name] = logits(adapted, batch)
    assert (found["dense"] - logits(model, batch)[:, :1]).abs().max() > 1e-3
    torch.testing.assert_close(found["compact"], found["dense"], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found["made"], found["dense"], atol=1e-9, rtol=1e-9)


def test_krona_adds_the_kronecker_product(kind: str) -> None:
    """The oracle is transformers alone: a copy of the model with W + s A ⊗ B written into it."""
    base, batch = tiny_model(kind).double(), tiny_batch(kind)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    adapter = doubled(make(base, KronaConfig(factor=8, strength=0.25, targets=("all",)), labels=2))
    moved = tiny_model(kind).double()
    for path in adapter.spec.config.targets:
        a, b = (adapter.tensors[f"{path}.krona_{side}"] for side in "AB")
        module: Any = moved.get_submodule(path)
        update = 0.25 * torch.kron(a, b)
        with torch.no_grad():
            module.weight.add_(update if isinstance(module, nn.Linear) else update.T)
    adapted = attach(base, {"krona": adapter}, check_base=False)
    heads = adapter.head_tensors()
    with torch.no_grad():
        for key, value in heads.items():
            moved.get_submodule(key.rpartition(".")[0]).register_parameter(key.rpartition(".")[2], nn.Parameter(value))
    with adapted.route("krona"), torch.no_grad():
        torch.testing.assert_close(logits(adapted, batch), logits(moved, batch), atol=1e-9, rtol=1e-9)
    adapted.detach()
    torch.testing.assert_close(logits(export(base, adapter), batch), logits(moved, batch), atol=1e-6, rtol=1e-6)


def test_mixed_batch_beside_others_equals_single_runs_with_gradients() -> None:
    model, batch = tiny_model("bert").double(), tiny_batch("bert", rows=10)
    old = {"lora": LoraConfig(rank=2), "neck": BottleneckConfig(size=6, activation="gelu")}
    made = {name: make(model, config, seed=seed) for seed, (name, config) in enumerate({**old, **NEW}.items())}
    adapted = attach(model, {name: doubled(each) for name, each in made.items()}, check_base=False)
    adapted.train_only(*adapted.names)
    mixture = {"compact": 0.3, "neck": 0.5, "krona": -1.0, "krona-all": 2.0}
    mixed_as_single(adapted, [*made, None, mixture, {"krona": 0.5}], batch, 1e-9)


def test_a_mixture_with_a_bottleneck_at_the_same_norm_is_the_sum() -> None:
    """Both sit on one LayerNorm, which must run again once, on the sum."""
    model, batch = tiny_model("bert").double(), tiny_batch("bert")
    compact = doubled(make(model, CompacterConfig(size=8, spread=1.0), seed=1))
    neck = doubled(make(model, BottleneckConfig(size=6), seed=2))
    one = {"compact": compact, "neck": neck, "dense": written_out(compact)}
    adapted = attach(model, one, check_base=False)
    with torch.no_grad():
        with adapted.route([{"compact": 0.4, "neck": 0.7}] * 8):
            mixed = logits(adapted, batch)
        with adapted.route([{"dense": 0.4, "neck": 0.7}] * 8):
            torch.testing.assert_close(mixed, logits(adapted, batch), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", NEW)
def test_fresh_it_is_the_base_and_comes_back_bit_for_bit(name: str, kind: str, tmp_path: Path) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    bare, fresh = logits(model, batch), new_adapter(model, NEW[name])
    hub = Hub.create(tmp_path)
    stored = make(model, NEW[name], labels=2)
    back = hub.get(hub.put("one", stored))
    assert back.spec == stored.spec
    assert all(torch.equal(back.tensors[key], value) for key, value in stored.tensors.items())
    adapted = attach(model, {"fresh": fresh, "stored": back})
    with adapted.route("fresh"):
        torch.testing.assert_close(logits(adapted, batch), bare, atol=2e-6, rtol=2e-6)
    out = adapted.extract("stored")
    assert out.spec == back.spec
    assert out.tensors.keys() == back.tensors.keys()
    assert all(torch.equal(out.tensors[key], value) for key, value in back.tensors.items())
    adapted.detach()
    assert torch.equal(logits(model, batch), bare)


def test_one_rule_for_all_layers_learns_once() -> None:
    model = tiny_model("bert")
    adapted = attach(model, {"one": make(model, CompacterConfig(size=8))})
    adapted.train_only("one")
    rules = [weight for name, weight in adapted.named_parameters() if weight.shape == (4, 4, 4)]
    assert len(rules) == 1
    sizes = {"phm_down": 8 + 32, "phm_up": 8 + 32, "biases": 8 + 32}
    assert sum(weight.numel() for weight in adapted.trainable()) == 64 + 2 * sum(sizes.values())


def test_a_merge_takes_it_as_the_bottleneck_it_is() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    pair = [make(model, CompacterConfig(size=8), labels=2, seed=seed) for seed in (1, 2)]
    merged = merge(pair, weights=[0.5, 2.0])
    assert merged.spec.method == "bottleneck"
    adapted = attach(model, {"merged": merged, "a": pair[0], "b": pair[1]})
    with torch.no_grad():
        with adapted.route([{"a": 0.5, "b": 2.0}] * 8, heads="merged"):
            mixed = logits(adapted, batch)
        with adapted.route("merged"):
            torch.testing.assert_close(logits(adapted, batch), mixed, atol=1e-4, rtol=1e-4)


def test_what_is_refused() -> None:
    model = tiny_model("bert")
    with pytest.raises(ConfigError, match="multiple of the division"):
        CompacterConfig(size=6)
    with pytest.raises(UnsupportedAdapterError, match="--division"):
        new_adapter(model, CompacterConfig(size=5, division=5))
    with pytest.raises(ConfigError, match="factor"):
        KronaConfig(factor=0)
    for config, part in ((CompacterConfig(size=8), "phm_rule"), (KronaConfig(factor=4), "krona_A")):
        adapter = new_adapter(model, config)
        codec = codec_of(adapter.spec)
        key = next(key for key in adapter.tensors if key.endswith(part))
        lacking = replace(adapter, tensors={other: value for other, value in adapter.tensors.items() if other != key})
        with pytest.raises(CorruptAdapterError, match="shapes"):
            codec.check(codec.encode(lacking), adapter.spec)


def test_krona_and_lora_merge_in_the_space_of_updates() -> None:
    model = tiny_model("bert")
    pair = [make(model, LoraConfig(rank=3), seed=1), make(model, KronaConfig(factor=4, strength=0.5), seed=2)]
    merged = merge(pair, weights=[2.0, -1.0])
    path = merged.spec.config.targets[0]
    a, b = (pair[0].tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
    one, two = (pair[1].tensors[f"{path}.krona_{side}"].double() for side in "AB")
    wanted = 2 * (16 / 3) * (b @ a) - 0.5 * torch.kron(one, two)
    config = merged.spec.config
    assert isinstance(config, LoraConfig)
    left, right = (merged.tensors[f"{path}.lora_{side}.weight"].double() for side in "BA")
    torch.testing.assert_close(config.scale_of(path) * (left @ right), wanted, atol=1e-5, rtol=1e-5)
