"""CoDA against a BERT written out here, text by text without padding; the soft top-k against its closed form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from graftory import Adapter, AdapterConfig, BottleneckConfig, Hub, LoraConfig, attach, export, merge, new_adapter
from graftory.adapters import Row
from graftory.adapters.coda import chosen_of
from graftory.adapters.soft_top_k import soft_top_k
from graftory.adapters.token_choice import best_first
from graftory.config import CodaConfig, PrefixConfig, PromptConfig
from graftory.errors import (
    BaseMismatchError,
    ConfigError,
    CorruptAdapterError,
    MergeError,
    RouteError,
    UnsupportedAdapterError,
)
from graftory.hub.base_check import base_shapes, check_fits
from graftory.hub.codecs import codec_of
from tests.adapter_samples import logits, make, mixed_as_single
from tests.conftest import tiny_batch, tiny_model

CONFIG = CodaConfig(attention="k_to_all", share=0.4, softness=0.7, size=5, activation="gelu")
FULL = replace(CONFIG, attention="full")
ENCODERS = ("bert", "roberta", "distilbert", "vit")


def doubled(adapter: Adapter) -> Adapter:
    return replace(adapter, tensors={key: value.double() for key, value in adapter.tensors.items()})


def closed_form(scores: Tensor, count: int, epsilon: float) -> Tensor:
    """λ of one row: of the k, the m largest are at 1, so that the others share k - m by a softmax."""
    ordered = scores.sort(descending=True).values
    for capped in range(count):
        factor = (count - capped) / (ordered[capped:] / epsilon).exp().sum()
        if factor * (ordered[capped] / epsilon).exp() <= 1:
            return (factor * (scores / epsilon).exp()).clamp(max=1)
    return torch.ones_like(scores)


@pytest.mark.parametrize(
    ("n", "k", "epsilon"), [(128, 43, 1.0), (10, 4, 1.0), (10, 9, 1.0), (30, 10, 0.3), (9, 3, 5.0)]
)
def test_soft_top_k_is_its_closed_form(n: int, k: int, epsilon: float) -> None:
    scores = torch.randn(4, n, dtype=torch.double, generator=torch.Generator().manual_seed(n))
    count, softness = torch.full((4,), k), torch.full((4,), epsilon, dtype=torch.double)
    exact = torch.stack([closed_form(row, k, epsilon) for row in scores])
    torch.testing.assert_close(exact.sum(1), count.double(), atol=1e-9, rtol=0)
    found = soft_top_k(scores, count, softness, steps=1000)
    torch.testing.assert_close(found, exact, atol=1e-9, rtol=0)
    assert torch.equal(found == 1, exact == 1)
    if k < n / 2 and epsilon >= 1:
        torch.testing.assert_close(soft_top_k(scores, count, softness), exact, atol=1e-5, rtol=0)


def test_soft_top_k_of_rows_that_differ_and_its_gradients() -> None:
    scores = torch.randn(4, 7, dtype=torch.double, generator=torch.Generator().manual_seed(3), requires_grad=True)
    hidden = torch.tensor([[False] * 5 + [True] * 2, [False] * 7, [False] * 3 + [True] * 4, [False] * 7])
    count, softness = torch.tensor([2, 3, 3, 7]), torch.tensor([1.0, 0.4, 1.0, 2.0], dtype=torch.double)

    def of(values: Tensor) -> Tensor:
        return soft_top_k(values.masked_fill(hidden, -torch.inf), count, softness)

    found = of(scores)
    assert not found[hidden].any()
    assert torch.equal(found[2], (~hidden[2]).double())
    assert torch.equal(found[3], torch.ones(7).double())
    alone = soft_top_k(scores[:1, :5], count[:1], softness[:1])
    torch.testing.assert_close(found[:1, :5], alone, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(of, (scores,))


def test_of_equal_tokens_the_first_is_chosen_and_the_count_is_rounded_up() -> None:
    assert best_first(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]), 3).tolist() == [[1, 2, 3]]
    assert chosen_of(1 / 3, 7) == (1, 1, 1, 1, 2, 2, 2, 3)
    assert chosen_of(0.07, 100)[100] == 7  # 0.07 * 100 is 7.000000000000001
    assert chosen_of(1.0, 3) == (1, 1, 2, 3)


def weights_of(scores: Tensor, count: int, epsilon: float) -> Tensor:
    """λ of one row by the paper's twenty steps, written for u = exp(a / ε): u ← k / Σ min(exp(s / ε), 1 / u)."""
    if count >= len(scores):
        return torch.ones_like(scores)
    shift = math.inf
    for step in range(20):
        soft = epsilon * max(4.0 * 0.7**step, 1.0)
        held = (torch.minimum(scores, torch.full_like(scores, -shift if step else math.inf)) / soft).exp()
        shift = soft * math.log(count / float(held.sum()))
    return ((scores + shift) / epsilon).exp().clamp(max=1)


def written_out(model: Any, adapter: Adapter, ids: Tensor) -> Tensor:
    """The logits of one text [1, n], n its own length, by the formulas."""
    t, bert, config = adapter.tensors, model.bert, adapter.spec.config
    assert isinstance(config, CodaConfig)
    heads = model.config.num_attention_heads
    x = bert.embeddings(input_ids=ids)[0]
    for number, layer in enumerate(bert.encoder.layer):
        path = f"bert.encoder.layer.{number}.output.dense"
        scores = x @ t[f"{path}.coda_router.weight"]
        count = math.ceil(config.share * len(x))
        chosen = scores.argsort(descending=True)[:count]
        counts = weights_of(scores, count, config.softness)[chosen, None]
        own, less = layer.attention.self, config.attention == "k_to_all"
        asking = chosen if less else torch.arange(len(x))
        q, k, v = (
            part(rows).unflatten(-1, (heads, -1)).transpose(0, 1)
            for part, rows in ((own.query, x[asking]), (own.key, x), (own.value, x))
        )
        mixed = ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)
        update = torch.zeros_like(x)
        update[asking] = layer.attention.output.dense(mixed) * (counts if less else 1)
        h = layer.attention.output.LayerNorm(x + update)
        inner = functional.gelu(h @ t[f"{path}.adapter_down.weight"].T + t[f"{path}.adapter_down.bias"])
        beside = inner @ t[f"{path}.adapter_up.weight"].T + t[f"{path}.adapter_up.bias"]
        update = torch.zeros_like(h)
        update[chosen] = counts * layer.output.dense(layer.intermediate(h[chosen]))
        x = layer.output.LayerNorm(h + beside + update)
    logits: Tensor = bert.pooler(x[None]) @ t["classifier.weight"].T + t["classifier.bias"]
    return logits[0]


@pytest.mark.parametrize("config", [CONFIG, FULL, CodaConfig(attention="k_to_all", size=3, activation="gelu")])
def test_it_is_the_paper_written_out(config: CodaConfig) -> None:
    model, batch = tiny_model("bert").double(), tiny_batch("bert")
    adapter = doubled(make(model, config, labels=3))
    adapted = attach(model, {"it": adapter}, check_base=False)
    with adapted.route("it"), torch.no_grad():
        found = logits(adapted, batch)
    with torch.no_grad():
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
            wanted = written_out(model, adapter, ids[None, : int(mask.sum())])
            torch.testing.assert_close(found[row], wanted, atol=1e-9, rtol=1e-9)


@contextmanager
def counted(model: Any, **paths: str) -> Iterator[Counter[str]]:
    """How many tokens reach some modules."""
    seen: Counter[str] = Counter()
    handles = []
    for name, path in paths.items():

        def note(_: Any, args: tuple[Tensor, ...], name: str = name) -> None:
            seen[name] += args[0].shape[:-1].numel()

        handles.append(model.get_submodule(path).register_forward_pre_hook(note))
    yield seen
    for handle in handles:
        handle.remove()


BERT = {
    "query": "bert.encoder.layer.1.attention.self.query",
    "key": "bert.encoder.layer.1.attention.self.key",
    "out": "bert.encoder.layer.1.attention.output.dense",
    "up": "bert.encoder.layer.1.intermediate.dense",
    "down": "bert.encoder.layer.1.output.dense",
}


def test_the_frozen_layers_do_not_run_on_the_others() -> None:
    """8 rows of 10 tokens, of which 4 a row are chosen."""
    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapted = attach(model, {"it": make(model, CONFIG), "full": make(model, FULL), "lora": make(model, LoraConfig())})
    routes: dict[str, list[Row]] = {
        "it": ["it"] * 8,
        "full": ["full"] * 8,
        "both": ["it", "full"] * 4,
        "mixed": [*["it"] * 7, "lora"],
    }
    tokens = {}
    for name, rows in routes.items():
        with counted(model, **BERT) as seen, adapted.route(rows), torch.no_grad():
            logits(adapted, batch)
        tokens[name] = dict(seen)
    everywhere = dict.fromkeys(BERT, 80)
    assert tokens["it"] == {**dict.fromkeys(BERT, 32), "key": 80}
    assert tokens["full"] == tokens["both"] == {**everywhere, "up": 32, "down": 32}
    assert tokens["mixed"] == everywhere


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_answers_the_chosen_queries_alone(attention: str) -> None:
    """Both implementations, with what they say about the weights."""
    model, batch = tiny_model("bert"), tiny_batch("bert")
    model.set_attn_implementation(attention)
    adapted = attach(model, {"it": make(model, CONFIG, labels=2)})
    with adapted.route("it"), torch.no_grad():
        output = model(**batch, output_attentions=attention == "eager")
        assert torch.equal(output.logits, logits(adapted, batch))
    if attention == "eager":
        asked = output.attentions[0].sum(-1)
        assert asked.shape == (8, 4, 10)
        torch.testing.assert_close(asked.sum(-1), torch.full((8, 4), 4.0))
    assert model.config._attn_implementation != attention
    adapted.detach()
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("kind", ENCODERS)
def test_with_share_one_a_fresh_one_changes_nothing(kind: str) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    bare = logits(model, batch)
    fresh = {name: new_adapter(model, replace(CONFIG, share=share)) for name, share in (("whole", 1.0), ("less", 0.4))}
    adapted = attach(model, fresh)
    with adapted.route("whole"), torch.no_grad():
        torch.testing.assert_close(logits(adapted, batch), bare, atol=1e-6, rtol=1e-6)
    with adapted.route("less"), torch.no_grad():
        assert (logits(adapted, batch) - bare).abs().max() > 1e-4


def test_mixed_batch_beside_others_equals_single_runs_with_gradients() -> None:
    """A single run is narrow, the mixed batch is not."""
    for kind in ENCODERS:
        model, batch = tiny_model(kind).double(), tiny_batch(kind, rows=9)
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        configs: dict[str, AdapterConfig] = {
            "one": CONFIG,
            "two": CodaConfig(attention="k_to_all", size=7, share=0.7, softness=2.0),
            "full": FULL,
            "prefix": PrefixConfig(length=3),
            "lora": LoraConfig(rank=2, targets=("all",)),
            "neck": BottleneckConfig(size=6, placement="houlsby"),
            "beside": BottleneckConfig(size=4, placement="parallel"),
        }
        made = {name: doubled(make(model, config, seed=seed)) for seed, (name, config) in enumerate(configs.items())}
        adapted = attach(model, made, check_base=False)
        adapted.train_only(*adapted.names)
        within: Row = {"one": 1.0, "lora": 0.5, "prefix": 1.0, "beside": 1.0, "neck": 0.7}
        mixed_as_single(adapted, [*made, None, within], batch, 1e-9)
        adapted.zero_grad()
        # a narrow batch over several of them
        several: list[Row] = [within, "two", "one", {"two": 1.0, "beside": 1.0}, *["full"] * 3, "two", "one"]
        mixed_as_single(adapted, several, batch, 1e-9)


@pytest.mark.parametrize("config", [CONFIG, FULL])
def test_a_router_learns_by_the_slope_of_the_loss(config: CodaConfig) -> None:
    """By central differences: within a step that changes no choice, λ alone carries what the router does."""
    model, batch = tiny_model("bert").double(), tiny_batch("bert")
    adapted = attach(model, {"it": doubled(make(model, config, labels=3))}, check_base=False)
    adapted.train_only("it")
    (router,) = (each for name, each in adapted.named_parameters() if "layer/0/" in name and "coda_router" in name)

    def loss() -> Tensor:
        with adapted.route("it"):
            return 1e3 * logits(adapted, batch).square().sum()

    loss().backward()
    slope = router.grad
    assert slope is not None
    assert slope.abs().max() > 1e-3
    with torch.no_grad():
        for at in slope.abs().topk(3).indices:
            router[at] += 1e-5
            above = loss()
            router[at] -= 2e-5
            below = loss()
            router[at] += 1e-5
            torch.testing.assert_close(slope[at], (above - below) / 2e-5, atol=1e-6, rtol=1e-4)


def test_rows_of_others_keep_their_bits() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    bare = logits(model, batch)
    adapted = attach(model, {"it": make(model, CONFIG), "lora": make(model, LoraConfig(targets=("all",)))})
    rows: list[Row] = ["it", None, "lora", "it", "lora", None, "it", "it"]
    with adapted.route(rows), torch.no_grad():
        mixed = logits(adapted, batch)
    with adapted.route([None if row == "it" else row for row in rows]), torch.no_grad():
        without = logits(adapted, batch)
    others = [number for number, row in enumerate(rows) if row != "it"]
    assert torch.equal(mixed[others], without[others])
    assert torch.equal(mixed[[1, 5]], bare[[1, 5]])


@pytest.mark.parametrize("config", [CONFIG, FULL])
def test_padding_changes_nothing(config: CodaConfig) -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapted = attach(model, {"it": make(model, config, labels=2)})
    wider = {key: functional.pad(value, (0, 7)) for key, value in batch.items()}
    with adapted.route("it"), torch.no_grad():
        torch.testing.assert_close(logits(adapted, wider), logits(adapted, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_it_comes_back_bit_for_bit_and_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    bare, named = logits(model, batch), model.config._attn_implementation
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
    assert model.config._attn_implementation == named
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_targets_pick_layers() -> None:
    model = tiny_model("bert")
    adapter = new_adapter(model, replace(CONFIG, targets=("layer.1.output.dense",)))
    assert adapter.spec.config.targets == ("bert.encoder.layer.1.output.dense",)
    assert set(adapter.tensors) == {f"bert.encoder.layer.1.output.dense.{part}" for part in CodaConfig.parts}
    with pytest.raises(UnsupportedAdapterError, match="query"):
        new_adapter(model, replace(CONFIG, targets=("query",)))


def test_headers_tell_whether_it_fits_a_base(tmp_path: Path) -> None:
    model = tiny_model("bert")
    adapter = new_adapter(model, CONFIG)
    entries = codec_of(adapter.spec).check(codec_of(adapter.spec).encode(adapter), adapter.spec)
    model.save_pretrained(tmp_path / "own")
    check_fits(adapter.spec, entries, base_shapes(tmp_path / "own"))
    wide = type(model.config).from_dict({**model.config.to_dict(), "hidden_size": 64})
    type(model)(wide).save_pretrained(tmp_path / "wide")
    with pytest.raises(BaseMismatchError, match="wide"):
        check_fits(adapter.spec, entries, base_shapes(tmp_path / "wide"))


def test_models_that_are_refused() -> None:
    for kind in ("gpt2", "t5", "llama"):
        with pytest.raises(UnsupportedAdapterError, match="token by token"):
            new_adapter(tiny_model(kind), CONFIG)
    for setting, value in (("is_decoder", True), ("chunk_size_feed_forward", 4)):
        model = tiny_model("bert")
        setattr(model.config, setting, value)
        with pytest.raises(UnsupportedAdapterError, match=setting):
            new_adapter(model, CONFIG)


def test_what_is_refused() -> None:
    wrong: tuple[dict[str, Any], ...] = (
        {"share": 0.0},
        {"share": 1.1},
        {"share": math.nan},
        {"softness": 0.0},
        {"size": 0},
    )
    for options in wrong:
        with pytest.raises(ConfigError, match=f"{next(iter(options))}: got"):
            CodaConfig(**options)
    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapter = make(model, CONFIG)
    with pytest.raises(MergeError, match="a coda adapter chooses tokens"):
        export(model, adapter)
    with pytest.raises(MergeError, match="coda"):
        merge([adapter, adapter], method="linear")
    others = {"other": make(model, replace(CONFIG, activation="relu"), seed=1), "full": make(model, FULL, seed=2)}
    adapted = attach(model, {"it": adapter, **others, "prompt": make(model, PromptConfig(length=2))})
    with pytest.raises(RouteError, match="soft prompts"), adapted.route(["it", "prompt"] * 4):
        logits(adapted, batch)
    mixtures: list[Row] = [{"it": 0.5}, {"it": 1.0, "other": 1.0}, {"it": 1.0, "full": 1.0}]
    for row in mixtures:
        with pytest.raises(RouteError, match="one, at weight 1"), adapted.route([row, "it"] * 4):
            logits(adapted, batch)


@pytest.mark.parametrize("part", CodaConfig.parts)
def test_files_that_lack_something_are_refused(part: str) -> None:
    adapter = make(tiny_model("bert"), CONFIG)
    key = next(key for key in adapter.tensors if key.endswith(part))
    lacking = {other: value for other, value in adapter.tensors.items() if other != key}
    codec = codec_of(adapter.spec)
    codec.check(codec.encode(adapter), adapter.spec)
    for tensors in (lacking, {**lacking, key: torch.ones(3)}):
        with pytest.raises(CorruptAdapterError, match="shapes"):
            codec.check(codec.encode(replace(adapter, tensors=tensors)), adapter.spec)
