"""Adapters in a model, on every architecture: attach, route, train, extract, detach."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftory import BottleneckConfig, LoraConfig, attach, base_of, new_adapter
from graftory.adapters.route import Row
from graftory.config import Placement
from graftory.errors import BaseMismatchError, RouteError, ShapeError, UnsupportedAdapterError
from graftory.kernels import inlet
from tests.adapter_samples import PLACEMENTS, ROWS, eight, logits, make, task
from tests.conftest import RELATIVES, TINY, tiny_batch, tiny_model


@pytest.mark.parametrize("kind", [*TINY, *RELATIVES])
def test_mixed_batch_equals_single_runs(kind: str) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    with torch.no_grad():
        bare = logits(model, batch)
    adapted = attach(model, eight(model))
    with adapted.route(ROWS), torch.no_grad():
        mixed = logits(adapted, batch)
    assert mixed.shape[-1] == 6
    for i, row in enumerate(ROWS):
        assert row is None or isinstance(row, str)
        with adapted.route(row), torch.no_grad():
            single = logits(adapted, {key: value[i : i + 1] for key, value in batch.items()})[0]
        width = single.shape[-1]
        torch.testing.assert_close(mixed[i, :width], single, atol=1e-5, rtol=1e-5)
        assert torch.isneginf(mixed[i, width:]).all()
        if row is None:
            assert torch.equal(mixed[i, :width], bare[i])
        else:
            assert (single[:2] - bare[i]).abs().max() > 1e-3


def test_mixed_batch_gradients_equal_single_runs(kind: str) -> None:
    """In double precision, so that what is compared is the mathematics and not the rounding."""
    model, batch = tiny_model(kind), tiny_batch(kind)
    adapters = eight(model)
    double = {
        name: replace(each, tensors={k: v.double() for k, v in each.tensors.items()}) for name, each in adapters.items()
    }
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    adapted = attach(model.double(), double, check_base=False)
    adapted.train_only(*adapted.names)
    with adapted.route(ROWS):
        out = logits(adapted, batch)
        out.masked_fill(torch.isneginf(out), 0.0).square().sum().backward()
    mixed = {name: weight.grad for name, weight in adapted.named_parameters() if weight.requires_grad}
    adapted.zero_grad()
    for i, row in enumerate(ROWS):
        assert row is None or isinstance(row, str)
        with adapted.route(row):
            one = logits(adapted, {key: value[i : i + 1] for key, value in batch.items()})
            if one.requires_grad:
                one.square().sum().backward()
    single = {name: weight.grad for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert any(grad is not None and grad.abs().max() > 1e-3 for grad in mixed.values())
    for name, grad in mixed.items():
        expected = single[name]
        if grad is None or expected is None:
            assert not any(each is not None and each.any() for each in (grad, expected)), name
            continue
        torch.testing.assert_close(grad, expected, atol=1e-9, rtol=1e-9, msg=partial("{}: {}".format, name))
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("kind", [*TINY, *RELATIVES])
def test_one_forward_answers_through_many_heads(kind: str) -> None:
    """Or says that it cannot: where a layer lies between two heads, or a token's logits are picked."""
    model, batch = tiny_model(kind), tiny_batch(kind)
    adapters = {"body": make(model, LoraConfig(), labels=3), "a": make(model, LoraConfig(), labels=2, seed=1)}
    adapted = attach(model, {**adapters, "b": make(model, LoraConfig(), labels=5, seed=2)})
    with torch.no_grad(), adapted.route("body"):
        logits(adapted, batch)
        found = adapted.through_heads(["a", "b"])
    assert (found is None) == (kind in {"distilbert", "gpt2", "llama", "qwen2", "mistral", "qwen3"})
    if found is None:
        return
    for head, got in zip(("a", "b"), found, strict=True):
        with torch.no_grad(), adapted.route("body", head):
            assert torch.equal(logits(adapted, batch), got)
    with pytest.raises(RouteError, match="nothing was run"), adapted.route("body"):
        adapted.through_heads(["a"])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_fresh_adapters_change_nothing(kind: str, placement: Placement) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    bare = logits(model, batch)
    adapters = {
        "lora": new_adapter(model, LoraConfig(targets=("all",))),
        "neck": new_adapter(model, BottleneckConfig(placement=placement)),
    }
    adapted = attach(model, adapters)
    for name in adapters:
        with adapted.route(name):
            torch.testing.assert_close(logits(adapted, batch), bare, atol=1e-6, rtol=1e-6)


def test_detach_leaves_the_model_bit_identical(kind: str) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    before, state = logits(model, batch), copy.deepcopy(model.state_dict())
    grads = {name: weight.requires_grad for name, weight in model.named_parameters()}
    adapted = attach(model, eight(model))
    assert list(model.state_dict()) == list(state)
    with adapted.route("small"):
        logits(adapted, batch)
    assert adapted.detach() is model
    assert torch.equal(logits(model, batch), before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert grads == {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_extract_gives_the_tensors_back(kind: str) -> None:
    model = tiny_model(kind)
    adapters = eight(model)
    adapted = attach(model, adapters)
    for name, adapter in adapters.items():
        back = adapted.extract(name)
        assert back.spec == adapter.spec
        assert set(back.tensors) == set(adapter.tensors)
        assert all(torch.equal(back.tensors[key], value) for key, value in adapter.tensors.items())


def test_mixture_is_the_weighted_sum_of_updates() -> None:
    """At one linear layer the outputs are base + 0.7 delta_a + 0.3 delta_b, in closed form."""
    model = tiny_model("bert")
    target = "bert.encoder.layer.0.attention.self.query"
    a, b = (make(model, LoraConfig(rank=r, targets=(target,)), seed=r) for r in (2, 3))
    query, seen = model.get_submodule(target), []
    adapted = attach(model, {"a": a, "b": b})
    query.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with adapted.route([{"a": 0.7, "b": 0.3}, None]), torch.no_grad():
        logits(adapted, tiny_batch("bert", rows=2))
    x, out = seen[0]
    delta = sum(
        w * 16 / r * (c.tensors[f"{target}.lora_B.weight"] @ c.tensors[f"{target}.lora_A.weight"])
        for w, r, c in ((0.7, 2, a), (0.3, 3, b))
    )
    assert isinstance(delta, Tensor)
    expected = torch.nn.functional.linear(x, query.weight, query.bias)
    torch.testing.assert_close(out[0], expected[0] + x[0] @ delta.T, atol=1e-5, rtol=1e-5)
    assert torch.equal(out[1], expected[1])


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_one_mixture_for_all_rows_is_what_it_is_beside_other_rows(dropout: float) -> None:
    """Its adapters are taken one after the other then; here beside a row without one, in closed form above."""
    model, batch = tiny_model("bert"), tiny_batch("bert", rows=4)
    adapted = attach(
        model, {name: make(model, LoraConfig(rank=r, dropout=dropout), seed=r) for name, r in (("a", 2), ("b", 3))}
    )
    body: Any = model.bert
    weights = torch.tensor([0.7, -0.4], requires_grad=True)
    row: Row = {"a": weights[0], "b": weights[1]}
    learnt = []
    for rows in ([row] * 4, [row] * 3 + [None]):
        adapted.train_only("a")
        for site in adapted.sites.values():
            site.train()
        with adapted.route(rows):
            hidden = body(**batch).last_hidden_state[:3]
        leaves = [weights, *adapted.trainable()]
        learnt.append([hidden, *torch.autograd.grad(hidden.square().sum(), leaves)])
    assert learnt[0][1].abs().min() > 0
    for alone, beside in zip(*learnt, strict=True):
        torch.testing.assert_close(alone, beside, atol=1e-4, rtol=1e-4)


def test_only_the_chosen_adapter_learns() -> None:
    model = tiny_model("bert")
    adapted = attach(model, eight(model))
    before = {name: adapted.extract(name) for name in adapted.names}
    adapted.train_only("neck")
    optimizer = torch.optim.SGD(adapted.trainable(), lr=0.5)
    with adapted.route(ROWS):
        out = logits(adapted, tiny_batch("bert"))
        out.masked_fill(torch.isneginf(out), 0.0).square().sum().backward()
    optimizer.step()
    for name, adapter in before.items():
        after = adapted.extract(name).tensors
        same = all(torch.equal(after[key], value) for key, value in adapter.tensors.items())
        assert same is (name != "neck")


def test_generation_with_beams_and_returned_sequences_follows_the_rows() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    adapters = {name: make(model, LoraConfig(targets=("all",), alpha=64), seed=i) for i, name in enumerate("ab")}
    adapted = attach(model, adapters)
    ids = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(0))
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    rows = ["a", None, "b"]
    with adapted.route(rows):
        mixed = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    singles = []
    for i, row in enumerate(rows):
        with adapted.route(row):
            one = ids[i : i + 1]
            singles.append(adapted.generate(input_ids=one, attention_mask=torch.ones_like(one), **options))
    assert torch.equal(mixed, torch.cat(singles))
    assert len({tuple(row[6:].tolist()) for row in torch.cat(singles)}) > 1


def test_paths_fit_the_backbone_with_and_without_its_prefix() -> None:
    whole = tiny_model("bert")
    bare = whole.bert
    adapter = make(whole, LoraConfig())
    batch = tiny_batch("bert")
    adapted = attach(whole, {"a": adapter})
    with adapted.route("a"), torch.no_grad():
        expected = adapted(**batch, output_hidden_states=True).hidden_states[-1]
    adapted.detach()
    adapted = attach(bare, {"a": adapter})
    with adapted.route("a"), torch.no_grad():
        assert torch.equal(adapted(**batch).last_hidden_state, expected)
    assert set(adapted.extract("a").tensors) == set(adapter.tensors)


def test_base_fingerprint_tells_weights_and_shapes_apart_but_not_heads_and_precision() -> None:
    one, same, other = tiny_model("bert"), tiny_model("bert"), tiny_model("bert", seed=1)
    torch.nn.init.normal_(same.classifier.weight)
    assert base_of(one, "x") == base_of(same, "x") == base_of(copy.deepcopy(one).to(torch.bfloat16), "x")
    assert base_of(one).config_hash == base_of(other).config_hash
    assert base_of(one).weights_hash != base_of(other).weights_hash
    assert base_of(one).config_hash != base_of(tiny_model("roberta")).config_hash
    with torch.no_grad():
        one.bert.encoder.layer[1].output.dense.bias[3] += 0.01
    assert base_of(one).weights_hash != base_of(same).weights_hash


def test_a_wrong_base_is_refused_and_nothing_stays_behind() -> None:
    adapter = make(tiny_model("bert"), LoraConfig(), labels=3)
    other = tiny_model("bert", seed=1)
    with pytest.raises(BaseMismatchError, match=r"was trained on .*pass the right --base"):
        attach(other, {"a": adapter})
    assert all(weight.requires_grad for weight in other.parameters())
    assert not any(module._forward_hooks for module in other.modules())
    with pytest.raises(BaseMismatchError, match="query"):
        attach(tiny_model("llama"), {"a": adapter}, check_base=False)


def test_wrong_shapes_are_refused_and_the_others_keep_working() -> None:
    model = tiny_model("bert")
    good = make(model, LoraConfig(), labels=3)
    key = next(key for key in good.tensors if "lora_B" in key)
    bad = replace(good, tensors={**good.tensors, key: torch.zeros(31, 8)})
    adapted = attach(model, {"good": good})
    with pytest.raises(ShapeError, match=r"got \(31, 8\), wanted \(32, 8\)"):
        adapted.add("bad", bad)
    assert adapted.names == ("good",)
    with adapted.route("good"):
        assert logits(adapted, tiny_batch("bert")).shape == (8, 3)


def test_one_adapter_leaves_and_the_others_stay() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapted = attach(model, eight(model))
    with adapted.route("neck"), torch.no_grad():
        before = logits(adapted, batch)
    for name in ("small", "large", "beside", "headless"):
        adapted.remove(name)
    assert adapted.names == ("neck",)
    with adapted.route("neck"), torch.no_grad():
        assert torch.equal(logits(adapted, batch), before)
    with pytest.raises(RouteError, match="no adapter 'small' is attached; attached: neck"):
        adapted.route("small")
    hooked = [name for name, module in model.named_modules() if module._forward_hooks]
    assert hooked == [*(f"bert.encoder.layer.{i}.output.LayerNorm" for i in range(2)), "classifier"]
    adapted.remove("neck")
    assert not any(module._forward_hooks for module in model.modules())


def test_routes_are_checked_and_undone_after_errors() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    bare = logits(model, batch)
    adapted = attach(model, {name: make(model, LoraConfig(), labels=2, seed=i) for i, name in enumerate("ab")})
    with pytest.raises(RouteError, match="no adapter 'c' is attached; attached: a, b"):
        adapted.route(["c"])
    with pytest.raises(RouteError, match="say which head"):
        adapted.route([{"a": 0.5, "b": 0.5}])
    with pytest.raises(RouteError, match="finite"):
        adapted.route([{"a": float("nan")}])
    with pytest.raises(RouteError, match="3 rows, the batch 8"), adapted.route(["a", "b", None]):
        logits(adapted, batch)
    with adapted.route([{"a": 0.5, "b": 0.5}] * 8, heads="a"):
        assert logits(adapted, batch).shape == (8, 2)
    assert torch.equal(logits(adapted, batch), bare)


def test_attaching_twice_is_refused_until_detached() -> None:
    model = tiny_model("bert")
    adapter = make(model, LoraConfig(), labels=2)
    adapted = attach(model, {"a": adapter})
    with pytest.raises(RouteError, match="attached to this model already"):
        attach(model, {"b": adapter})
    attach(adapted.detach(), {"b": adapter}).detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_takes_adapters_in_full(dtype: torch.dtype) -> None:
    batch = tiny_batch("bert")
    outputs = []
    for precision in (torch.float32, dtype):
        model = tiny_model("bert")
        adapters = eight(model)
        adapted = attach(model.to(precision), adapters, check_base=False)
        with adapted.route(ROWS), torch.no_grad():
            outputs.append(logits(adapted, batch))
    full, half = outputs
    assert half.dtype == dtype
    assert torch.equal(full.isneginf(), half.isneginf())
    finite = ~full.isneginf()
    assert (full[finite] - half[finite].float()).abs().max() < 0.1


def test_two_threads_keep_their_own_routes() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapted = attach(model, {name: make(model, LoraConfig(), labels=2, seed=i) for i, name in enumerate("ab")})

    def run(name: str) -> Tensor:
        with adapted.route(name), torch.no_grad():
            return logits(adapted, batch)

    expected = {name: run(name) for name in "ab"}
    with ThreadPoolExecutor(2) as pool:
        names = ["a", "b"] * 20
        assert all(torch.equal(out, expected[name]) for name, out in zip(names, pool.map(run, names), strict=True))


def test_targets_are_groups_roles_and_ends_of_paths_made_explicit() -> None:
    model = tiny_model("gpt2")
    assert new_adapter(model, LoraConfig()).spec.config.targets == tuple(
        f"transformer.h.{i}.attn.c_attn" for i in range(2)
    )
    assert len(new_adapter(model, LoraConfig(targets=("all",))).spec.config.targets) == 8
    assert new_adapter(model, LoraConfig(targets=("h.1.mlp.c_fc",))).spec.config.targets == (
        "transformer.h.1.mlp.c_fc",
    )
    with pytest.raises(UnsupportedAdapterError, match="'query' fits no linear layer"):
        new_adapter(model, LoraConfig(targets=("query",)))


def test_the_seed_decides_the_fresh_tensors() -> None:
    model = tiny_model("bert")
    first, second, other = (new_adapter(model, LoraConfig(init_seed=seed), task=task(3)).tensors for seed in (5, 5, 6))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_dropout_acts_in_training_only_and_at_each_adapters_rate() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    dry = make(model, LoraConfig(), labels=2)
    config = replace(dry.spec.config, dropout=0.5)  # type: ignore[call-arg]
    wet = replace(dry, spec=replace(dry.spec, config=config))
    adapted = attach(model, {"dry": dry, "wet": wet})
    rows = ["dry", "wet"] * 4
    with adapted.route(rows), torch.no_grad():
        still = logits(adapted, batch)
        for site in adapted.sites.values():
            site.train()
        moving = logits(adapted, batch)
    assert torch.allclose(moving[::2], still[::2], atol=1e-6)
    assert (moving[1::2] - still[1::2]).abs().min() > 0


@pytest.mark.parametrize("learns", [False, True])
def test_who_listens_to_all_modules_keeps_what_the_base_returned(learns: bool) -> None:
    """Updates are added in a layer's own memory, but not to what somebody was given before."""
    model, batch = tiny_model("bert"), tiny_batch("bert")
    layer = model.bert.encoder.layer[0].attention.self.query
    heard: list[Tensor] = []

    def listen(module: nn.Module, _: object, output: Tensor) -> None:
        if module is layer:
            heard.append(output)

    adapted = attach(model, {"a": make(model, LoraConfig(targets=("all",)), labels=3)})
    if learns:
        adapted.train_only("a")
    with adapted.route("a"), torch.set_grad_enabled(learns):
        alone = logits(adapted, batch)
    handle = nn.modules.module.register_module_forward_hook(listen)
    try:
        with adapted.route("a"), torch.set_grad_enabled(learns):
            torch.testing.assert_close(logits(adapted, batch), alone)
        with adapted.route(None), torch.no_grad():
            logits(adapted, batch)
    finally:
        handle.remove()
    assert torch.equal(*heard)


def test_a_layer_s_gradient_and_its_update_s_meet_at_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One mixed batch with and without inlets: the same gradients, at the input embeddings too."""
    from graftory.adapters import lora

    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapted = attach(
        model, {name: make(model, LoraConfig(targets=("all",)), 3, seed) for seed, name in enumerate("ab")}
    )
    adapted.train_only("a", "b")
    model.get_input_embeddings().weight.requires_grad_(True)
    entered, found = [], []

    def counted(x: Tensor) -> Tensor:
        entered.append(inlet(x) is not x)
        return inlet(x)

    for way in (counted, lambda x: x):
        monkeypatch.setattr(lora, "inlet", way)
        adapted.zero_grad()
        with adapted.route([*"abba", *"abab"]):
            logits(adapted, batch).square().sum().backward()
        found.append({name: weight.grad for name, weight in adapted.named_parameters() if weight.requires_grad})
    assert all(entered)
    assert len(entered) > 6
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-5, rtol=1e-4, msg=partial("{}: {}".format, name))
