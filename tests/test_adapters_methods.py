"""(IA)³, BitFit and DoRA in a model: mixed batches beside LoRA and bottlenecks, mixtures, folding, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graftory import Adapter, AdapterConfig, BottleneckConfig, Hub, LoraConfig, attach, export, merge, new_adapter
from graftory.adapters import Row, is_adapted
from graftory.config import BitfitConfig, DoraConfig, Ia3Config
from graftory.errors import ConfigError, CorruptAdapterError, MergeError, ShapeError, UnsupportedAdapterError
from tests.adapter_samples import logits, make, shaken, task
from tests.conftest import TINY, tiny_batch, tiny_model

BIASED = {"bert", "roberta", "distilbert", "gpt2", "qwen2", "vit"}
"""Architectures with biases outside of their heads."""
NEW: Mapping[str, AdapterConfig] = {
    "ia3": Ia3Config(),
    "ia3-q": Ia3Config(targets=("all",)),
    "dora": DoraConfig(rank=3, targets=("all",)),
    "dora-qv": DoraConfig(rank=2, alpha=9.0, rslora=True),
    "bitfit": BitfitConfig(),
}
OLD: Mapping[str, AdapterConfig] = {
    "lora": LoraConfig(rank=5, targets=("all",)),
    "neck": BottleneckConfig(size=6, activation="gelu"),
}
ROWS: tuple[Row, ...] = ("ia3", None, "dora", "lora", "bitfit", "neck", "dora-qv", "ia3-q", None)


def everything(model: Any, kind: str) -> dict[str, Adapter]:
    """One adapter of each kind that fits, far from fresh, each with a head."""
    fitting = {name: config for name, config in {**NEW, **OLD}.items() if name != "bitfit" or kind in BIASED}
    return {name: make(model, config, labels=2, seed=seed) for seed, (name, config) in enumerate(fitting.items())}


def rows_for(adapters: Mapping[str, Adapter]) -> list[Row]:
    return [row if row in adapters else None for row in ROWS]


def doubled(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    return {
        name: replace(each, tensors={key: value.double() for key, value in each.tensors.items()})
        for name, each in adapters.items()
    }


def test_mixed_batch_equals_single_runs_with_gradients(kind: str) -> None:
    """In double precision, so that what is compared is the mathematics and not the rounding."""
    model, batch = tiny_model(kind), tiny_batch(kind, rows=len(ROWS))
    adapters = everything(model, kind)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    adapted = attach(model.double(), doubled(adapters), check_base=False)
    bare = logits(model, batch)
    adapted.train_only(*adapted.names)
    rows = rows_for(adapters)
    with adapted.route(rows):
        mixed = logits(adapted, batch)
        mixed.square().sum().backward()
    together = {name: weight.grad for name, weight in adapted.named_parameters() if weight.requires_grad}
    adapted.zero_grad()
    for i, row in enumerate(rows):
        with adapted.route([row]):
            one = logits(adapted, {key: value[i : i + 1] for key, value in batch.items()})
        torch.testing.assert_close(mixed[i], one[0], atol=1e-9, rtol=1e-9)
        if row is None:
            assert torch.equal(mixed[i], bare[i])
        else:
            assert (one[0] - bare[i]).abs().max() > 1e-3
            one.square().sum().backward()
    for name, weight in adapted.named_parameters():
        if weight.requires_grad and together[name] is not None:
            torch.testing.assert_close(together[name], weight.grad, atol=1e-9, rtol=1e-9)
    learned = [grad for grad in together.values() if grad is not None and grad.abs().max() > 1e-6]
    assert len(learned) > 20


def test_fresh_adapters_change_nothing_and_leave_no_trace(kind: str) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    bare, state = logits(model, batch), copy.deepcopy(model.state_dict())
    fresh = {name: new_adapter(model, config) for name, config in NEW.items() if name != "bitfit" or kind in BIASED}
    adapted = attach(model, fresh)
    for name in fresh:
        with adapted.route(name):
            torch.testing.assert_close(logits(adapted, batch), bare, atol=2e-6, rtol=2e-6)
        back = adapted.extract(name)
        assert back.spec == fresh[name].spec
        assert all(torch.equal(back.tensors[key], value) for key, value in fresh[name].tensors.items())
    adapted.detach()
    assert torch.equal(logits(model, batch), bare)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


FITTING = [(name, kind) for name in NEW for kind in TINY if name != "bitfit" or kind in BIASED]


@pytest.mark.parametrize(("name", "kind"), FITTING)
def test_folded_into_the_base_it_gives_the_same_logits(name: str, kind: str) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    adapter = make(model, NEW[name], labels=2, seed=5)
    plain = export(model, adapter)
    adapted = attach(model, {"one": adapter})
    with adapted.route("one"), torch.no_grad():
        torch.testing.assert_close(logits(plain, batch), logits(adapted, batch), atol=1e-4, rtol=1e-4)


def test_bitfit_is_the_model_with_other_biases() -> None:
    """The oracle is transformers alone: a copy whose biases are moved."""
    batch, generator = tiny_batch("bert"), torch.Generator().manual_seed(2)
    base, moved = tiny_model("bert").double(), tiny_model("bert").double()
    adapter = new_adapter(base, BitfitConfig())
    biased = {path for path, module in base.named_modules() if getattr(module, "bias", None) is not None}
    assert set(adapter.spec.config.targets) == {path for path in biased if path != "classifier"}
    deltas = {key: torch.randn(value.shape, generator=generator).double() for key, value in adapter.tensors.items()}
    with torch.no_grad():
        for key, delta in deltas.items():
            bias = moved.get_submodule(key.removesuffix(".bias_delta")).bias
            assert isinstance(bias, Tensor)
            bias.add_(delta)
    adapted = attach(base, {"bias": replace(adapter, tensors=deltas)}, check_base=False)
    with adapted.route("bias"), torch.no_grad():
        torch.testing.assert_close(logits(adapted, batch), logits(moved, batch), atol=1e-9, rtol=1e-9)


PATH = "bert.encoder.layer.0.output.dense"


def outputs_at(configs: Mapping[str, AdapterConfig], rows: list[Row]) -> tuple[Any, dict[str, Adapter], Tensor, Tensor]:
    """One linear layer's module, the adapters there, what it read before they did, and what it returned."""
    model = tiny_model("bert").double()
    adapters = doubled({name: make(model, config, seed=seed) for seed, (name, config) in enumerate(configs.items())})
    module, seen = model.get_submodule(PATH), []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    adapted = attach(model, adapters, check_base=False)
    module.register_forward_hook(lambda _, args, out: seen.append(out))
    with adapted.route(rows), torch.no_grad():
        logits(adapted, tiny_batch("bert", rows=len(rows)))
    return module, adapters, seen[0], seen[1]


def test_a_mixture_of_ia3_scales_by_what_the_vectors_change() -> None:
    config = Ia3Config(targets=("down",))
    mixture = {"a": 0.7, "b": 0.5}
    module, adapters, x, out = outputs_at({"a": config, "b": config}, [mixture, None, "a"])
    a, b = (adapters[name].tensors[f"{PATH}.ia3_l"][0] for name in "ab")
    expected = functional.linear(x[0] * (1 + 0.7 * (a - 1) + 0.5 * (b - 1)), module.weight, module.bias)
    torch.testing.assert_close(out[0], expected, atol=1e-9, rtol=1e-9)
    assert torch.equal(out[1], functional.linear(x, module.weight, module.bias)[1])
    torch.testing.assert_close(out[2], functional.linear(x[2] * a, module.weight, module.bias), atol=1e-9, rtol=1e-9)


def test_a_mixture_of_dora_adds_up_what_each_changes() -> None:
    configs = {name: DoraConfig(rank=rank, targets=(PATH,)) for name, rank in (("a", 2), ("b", 3))}
    module, adapters, x, out = outputs_at(configs, [{"a": 0.7, "b": 0.3}, None])
    base = functional.linear(x[0], module.weight, module.bias)
    expected = base
    for name, weight in (("a", 0.7), ("b", 0.3)):
        tensors = adapters[name].tensors
        moved = (
            module.weight
            + 16 / configs[name].rank * tensors[f"{PATH}.lora_B.weight"] @ tensors[f"{PATH}.lora_A.weight"]
        )
        scaled = (tensors[f"{PATH}.lora_magnitude_vector"] / moved.norm(dim=1))[:, None] * moved
        expected = expected + weight * (functional.linear(x[0], scaled, module.bias) - base)
    torch.testing.assert_close(out[0], expected, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_mixture_weights_learn(kind: str) -> None:
    """The gradient of each weight is the slope of the loss, by central differences."""
    model, batch = tiny_model(kind), tiny_batch(kind)
    adapters = doubled({name: make(model, NEW[name], seed=3) for name in ("ia3", "dora")})
    adapted = attach(model.double(), adapters, check_base=False)

    def loss(ia3: Any, dora: Any) -> Tensor:
        with adapted.route([{"ia3": ia3, "dora": dora}] * 8):
            return logits(adapted, batch).square().sum()

    gates = [torch.tensor(value, dtype=torch.double, requires_grad=True) for value in (0.6, 0.3)]
    loss(*gates).backward()
    for number, gate in enumerate(gates):
        up, down = ([torch.tensor(value, dtype=torch.double) for value in (0.6, 0.3)] for _ in range(2))
        up[number] += 1e-5
        down[number] -= 1e-5
        slope = (loss(*up) - loss(*down)) / 2e-5
        assert gate.grad is not None
        torch.testing.assert_close(gate.grad, slope.detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("first", ["bias", "neck"])
def test_the_order_of_attaching_changes_no_row(first: str) -> None:
    """A Pfeiffer bottleneck runs its LayerNorm again, without hooks: a bias delta at that norm must not be lost."""
    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapters = {"bias": make(model, BitfitConfig(), seed=1), "neck": make(model, BottleneckConfig(size=4), seed=2)}
    norms = {key: value for key, value in adapters["bias"].tensors.items() if "output.LayerNorm" in key}
    paths = tuple(key.removesuffix(".bias_delta") for key in norms)
    adapters["bias"] = replace(
        adapters["bias"], spec=replace(adapters["bias"].spec, config=BitfitConfig(targets=paths)), tensors=norms
    )
    both: list[Row] = [{"bias": 1.0, "neck": 1.0}] * 8
    adapted = attach(model, {name: adapters[name] for name in sorted(adapters, key=lambda name: name != first)})
    with adapted.route(both), torch.no_grad():
        together = logits(adapted, batch)
    with adapted.route("neck"), torch.no_grad():
        alone = logits(adapted, batch)
    assert (together - alone).abs().max() > 1e-3
    other = attach(tiny_model("bert"), dict(reversed(adapters.items())) if first == "bias" else adapters)
    with other.route(both), torch.no_grad():
        assert torch.equal(logits(other, batch), together)


def test_ia3_targets_and_what_each_scales() -> None:
    config = new_adapter(tiny_model("llama"), Ia3Config()).spec.config
    assert isinstance(config, Ia3Config)
    ends = {path.rpartition(".")[2] for path in config.targets}
    assert ends == {"k_proj", "v_proj", "down_proj"}
    assert {path.rpartition(".")[2] for path in config.feedforward} == {"down_proj"}
    with pytest.raises(ConfigError, match="feedforward: 'x' is no target"):
        Ia3Config(targets=("y",), feedforward=("x",))


def test_a_model_with_nothing_but_a_scaled_input_counts_as_adapted() -> None:
    model = tiny_model("bert")
    adapted = attach(model, {"a": make(model, Ia3Config(targets=("down",)))})
    assert is_adapted(model)
    assert not is_adapted(adapted.detach())


def test_dora_drops_out_in_training_only() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapted = attach(model, {"wet": make(model, DoraConfig(dropout=0.5), labels=2)})
    adapted.eval()
    with adapted.route("wet"), torch.no_grad():
        still = logits(adapted, batch)
        assert torch.equal(logits(adapted, batch), still)
        for site in adapted.sites.values():
            site.train()
        assert (logits(adapted, batch) - still).abs().min() > 0


def test_what_cannot_be_is_refused() -> None:
    llama, bert = tiny_model("llama"), tiny_model("bert")
    with pytest.raises(UnsupportedAdapterError, match="no biases outside of its head"):
        new_adapter(llama, BitfitConfig())
    with pytest.raises(UnsupportedAdapterError, match=r"'query\.x' fits no module with a bias"):
        new_adapter(bert, BitfitConfig(targets=("query.x",)))
    with pytest.raises(UnsupportedAdapterError, match="'nothing' fits no linear layer"):
        new_adapter(bert, Ia3Config(targets=("nothing",)))
    adapter = make(bert, Ia3Config(targets=("down",)))
    wrong = replace(adapter, tensors={key: value.T for key, value in adapter.tensors.items()})
    with pytest.raises(ShapeError, match=r"got \(48, 1\), wanted \(1, 48\)"):
        attach(bert, {"wrong": wrong})
    with pytest.raises(MergeError, match="scales the base's own weights, so merging needs them"):
        merge([adapter, adapter])


def test_quantised_weights_are_refused_by_dora() -> None:
    model = tiny_model("bert")
    adapter = new_adapter(model, DoraConfig(targets=(PATH,)))
    adapted = attach(model, {"a": adapter})
    module = model.get_submodule(PATH)
    module.weight = nn.Parameter(torch.zeros(module.weight.shape, dtype=torch.int8), requires_grad=False)
    module.forward = lambda x: x.new_zeros(*x.shape[:-1], 32)
    with adapted.route("a"), pytest.raises(UnsupportedAdapterError, match=r"holds torch\.int8"):
        logits(adapted, tiny_batch("bert"))


@pytest.mark.parametrize("name", list(NEW))
def test_a_hub_keeps_them_bit_for_bit(name: str, tmp_path: Path) -> None:
    adapter = make(tiny_model("bert"), NEW[name], labels=3)
    hub = Hub.create(tmp_path / "hub")
    back = hub.get(hub.put("mine", adapter))
    assert back.spec == adapter.spec
    assert all(torch.equal(back.tensors[key], value) for key, value in adapter.tensors.items())
    again = Hub.create(tmp_path / "other")
    out = hub.materialize("mine@1", tmp_path / "out")
    assert again.record(again.add(out, name="mine")).digest == hub.record("mine@1").digest


def test_bias_deltas_of_another_shape_are_refused(tmp_path: Path) -> None:
    adapter = shaken(new_adapter(tiny_model("bert"), BitfitConfig(), task=task(2)))
    key = next(key for key in adapter.tensors if key.endswith("bias_delta"))
    broken = replace(adapter, tensors={**adapter.tensors, key: torch.ones(2, 3)})
    with pytest.raises(CorruptAdapterError, match=r"is \(2, 3\), wanted \(d,\)"):
        Hub.create(tmp_path / "hub").put("mine", broken)
