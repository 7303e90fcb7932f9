"""SMoP in a model: the formula, batches, mixtures, caches, against slow and foreign references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from graftory import Adapter, BottleneckConfig, LoraConfig, attach
from graftory.adapters import Row
from graftory.adapters.smop import PROMPTS, ROUTER, mean_embedding, reading, route_prompts, routing_watched
from graftory.compose.smop import new_smop
from graftory.config import SmopConfig
from graftory.errors import ConfigError, RouteError, ShapeError, UnsupportedAdapterError
from tests.adapter_samples import logits, make
from tests.conftest import RELATIVES, TINY, tiny_batch, tiny_model

TEXT = [kind for kind in (*TINY, *RELATIVES) if kind != "vit"]
DECODERS = ("gpt2", "llama")
_SIZES: dict[str, Any] = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def spread_out(model: Any) -> Any:
    """Embeddings as spread as those of a trained model, so that rows are told apart by their means."""
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight.mul_(0.6 / weight.std())
    return model


def lively(model: Any, prompts: int = 3, length: int = 4, seed: int = 0, head: Adapter | None = None) -> Adapter:
    """Prompts whose router is sure of itself."""
    adapter = new_smop(model, SmopConfig(prompts=prompts, length=length, init_seed=seed), head=head)
    return replace(adapter, tensors={k: v * 8 if k.endswith(ROUTER) else v for k, v in adapter.tensors.items()})


def writer(kind: str) -> Any:
    """A tiny random language model whose outputs depend on what it reads."""
    torch.manual_seed(0)
    config: Any
    if kind == "gpt2":
        config = transformers.GPT2Config(**_SIZES, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "t5":
        shape: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        config = transformers.T5Config(**{**_SIZES, **shape, "decoder_start_token_id": 0})
        model = transformers.T5ForConditionalGeneration(config).eval()
        with torch.no_grad():  # without this it repeats what it wrote, as its outputs are its embeddings
            model.lm_head.weight = torch.nn.Parameter(torch.randn(60, 32))
        return model
    heads: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = transformers.LlamaConfig(**_SIZES, **heads, initializer_range=0.2)
    return transformers.LlamaForCausalLM(config).eval()


def padded_left(batch: dict[str, Tensor], extra: int = 0) -> dict[str, Tensor]:
    """The same rows with the padding in front."""
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        real = ids[mask.bool()]
        rows.append(torch.cat([real.new_zeros(len(ids) + extra - len(real)), real]))
    ids = torch.stack(rows)
    return {"input_ids": ids, "attention_mask": ids.ne(0).long()}


def test_routing_is_the_paper_s_formula_row_by_row() -> None:
    """In double precision, one row and one token at a time."""
    random = torch.Generator().manual_seed(0)
    embedded = torch.randn(7, 9, 6, generator=random, dtype=torch.float64)
    mask = (torch.rand(7, 9, generator=random) < 0.6).long()
    mask[3] = 0
    prompts = torch.randn(4, 5, 6, generator=random, dtype=torch.float64)
    router = 3 * torch.randn(4, 6, generator=random, dtype=torch.float64)
    got, weights = route_prompts(mean_embedding(embedded, mask), prompts, router)
    for row in range(7):
        mean, count = torch.zeros(6, dtype=torch.float64), 0
        for token in range(9):
            if mask[row, token]:
                mean, count = mean + embedded[row, token], count + 1
        mean = mean / max(count, 1)
        scores = [float(sum(router[j, i] * mean[i] for i in range(6))) for j in range(4)]
        total = sum(torch.tensor(scores, dtype=torch.float64).exp().tolist())
        best = max(range(4), key=lambda j: scores[j])
        weight = float(torch.tensor(scores[best], dtype=torch.float64).exp()) / total
        torch.testing.assert_close(got[row], weight * prompts[best], atol=1e-12, rtol=1e-12)
        assert float(weights[row, best]) == pytest.approx(weight)
    assert len(set(weights.argmax(1).tolist())) > 2


def test_noise_multiplies_the_logits_and_is_drawn_anew_for_each() -> None:
    x, router, prompts = torch.ones(4000, 2), torch.tensor([[1.0, 0.0], [0.0, -2.0]]), torch.zeros(2, 1, 2)
    torch.manual_seed(0)
    _, weights = route_prompts(x, prompts, router, noise=0.5)
    # log w_1 - log w_2 = g_1 (1 + d_1) - g_2 (1 + d_2), with g = (1, -2)
    gaps = weights[:, 0].log() - weights[:, 1].log()
    assert gaps.mean() == pytest.approx(3, abs=0.1)
    assert gaps.std() == pytest.approx(0.5 * 5**0.5, abs=0.05)
    assert torch.equal(route_prompts(x, prompts, router)[1][0], route_prompts(x, prompts, router)[1][1])


def test_the_start_is_the_paper_s_and_one_prompt_has_no_router() -> None:
    model = tiny_model("bert")
    fresh = new_smop(model, SmopConfig(prompts=4, length=60))
    path = "bert.embeddings.word_embeddings"
    assert {key: tuple(value.shape) for key, value in fresh.tensors.items()} == {
        f"{path}.{PROMPTS}": (4, 60, 32),
        f"{path}.{ROUTER}": (4, 32),
    }
    router, prompts = fresh.tensors[f"{path}.{ROUTER}"], fresh.tensors[f"{path}.{PROMPTS}"]
    torch.testing.assert_close(router @ router.T, torch.eye(4), atol=1e-5, rtol=0)
    assert prompts.std() == pytest.approx(1, abs=0.05)
    again = new_smop(model, SmopConfig(prompts=4, length=60, init_seed=1, spread=0.1))
    assert again.tensors[f"{path}.{PROMPTS}"].std() == pytest.approx(0.1, abs=0.005)
    assert set(new_smop(model, SmopConfig(prompts=1)).tensors) == {f"{path}.{PROMPTS}"}


@pytest.mark.parametrize("kind", TEXT)
def test_in_a_mixed_batch_every_row_is_what_it_is_alone(kind: str) -> None:
    """Prompts of two lengths, LoRA, a bottleneck, prompt with LoRA, none; also: a batch of one is a batch of many."""
    model = spread_out(tiny_model(kind))
    low = make(model, LoraConfig(), labels=2, seed=1)
    neck = make(model, BottleneckConfig(size=6), seed=2)
    adapters = {"a": lively(model), "b": lively(model, prompts=1, length=2, seed=1), "low": low, "neck": neck}
    adapted = attach(model, adapters)
    batch = tiny_batch(kind)
    rows: list[Row] = ["a", None, "b", "low", "a", {"a": 1.0, "low": 1.0}, "neck", None]
    chosen: list[Tensor] = []
    with torch.no_grad():
        with adapted.route(rows, ["low"] * 8):
            mixed = logits(adapted, batch)
        with adapted.route([None] * 8, ["low"] * 8):
            bare = logits(adapted, batch)
        for number, row in enumerate(rows):
            # T5 classifies at the end token, which a cut row would lose its place of: it stays padded
            stop = 10 if kind == "t5" else int(batch["attention_mask"][number].sum())
            with adapted.route([row], ["low"]):
                alone = logits(adapted, {key: value[number : number + 1, :stop] for key, value in batch.items()})
            torch.testing.assert_close(alone[0], mixed[number], atol=2e-6, rtol=1e-5)
            with adapted.route([row] * 8, ["low"] * 8), routing_watched(lambda _o, _s, _r, w: chosen.append(w)):
                many = logits(adapted, batch)
            torch.testing.assert_close(many[number], mixed[number], atol=2e-6, rtol=1e-5)
    changed = (mixed - bare).abs().amax(1) > 1e-4
    assert changed.tolist() == [True, False, True, True, True, True, True, False]
    assert len(set(chosen[0].argmax(1).tolist())) > 1
    adapted.detach()


def test_a_batch_of_one_is_a_batch_of_n() -> None:
    """The paper's code adds the prompts of a batch up: here not one row changes by more than 1e-6."""
    model = spread_out(tiny_model("bert")).double()
    adapter = lively(tiny_model("bert"), prompts=4, length=5)
    doubled = {key: value.double() for key, value in adapter.tensors.items()}
    adapted = attach(model, {"a": replace(adapter, tensors=doubled)}, check_base=False)
    for kind in (model, model.float()):
        batch = tiny_batch("bert", rows=16)
        with adapted.route("a"), torch.no_grad():
            whole = kind.bert(**batch).last_hidden_state
            for row in range(16):
                one = kind.bert(**{key: value[row : row + 1] for key, value in batch.items()}).last_hidden_state
                assert float((one[0] - whole[row]).abs().max()) <= 1e-6 * float(whole.abs().max())


@pytest.mark.parametrize("kind", DECODERS)
def test_padding_on_either_side_does_not_count(kind: str) -> None:
    model = writer(kind)
    adapted = attach(model, {"a": lively(model)})
    batch = tiny_batch(kind, rows=6)
    longer = {key: torch.nn.functional.pad(value, (0, 3)) for key, value in batch.items()}
    with adapted.route("a"), torch.no_grad():
        wanted = logits(adapted, batch)
        assert wanted.shape[1] == 10  # cut back to the text
        for other in (longer, padded_left(batch), padded_left(batch, extra=2)):
            got = logits(adapted, other)
            for row in range(6):
                left, right = other["attention_mask"][row].bool(), batch["attention_mask"][row].bool()
                torch.testing.assert_close(got[row][left], wanted[row][right], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", DECODERS)
def test_one_prompt_is_peft_s_prompt_tuning(kind: str) -> None:
    model = writer(kind)
    ours = new_smop(model, SmopConfig(prompts=1, length=4))
    batch = tiny_batch(kind, rows=5)
    adapted = attach(model, {"a": ours})
    with adapted.route("a"), torch.no_grad():
        got = logits(adapted, batch)
    adapted.detach()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        (embedding,) = [weight for name, weight in theirs.named_parameters() if "prompt_encoder" in name]
        (prompt,) = ours.tensors.values()
        embedding.copy_(prompt[0])
        wanted = logits(theirs, batch)[:, 4:]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], wanted[real], atol=1e-5, rtol=1e-5)


def test_one_prompt_is_prompt_tuning_made_by_hand_behind_cls() -> None:
    model = tiny_model("bert")
    ours = new_smop(model, SmopConfig(prompts=1, length=3))
    ids = tiny_batch("bert")["input_ids"][5:6]
    segments = torch.tensor([[0] * 5 + [1] * 5])
    adapted = attach(model, {"a": ours})
    with adapted.route("a"), torch.no_grad():
        got = adapted(input_ids=ids, token_type_ids=segments, output_hidden_states=True)
    adapted.detach()
    (prompt,) = ours.tensors.values()
    words = model.bert.embeddings.word_embeddings(ids)
    with torch.no_grad():
        wanted = model(
            inputs_embeds=torch.cat([words[:, :1], prompt, words[:, 1:]], 1),
            token_type_ids=torch.cat([segments[:, :1], segments.new_zeros(1, 3), segments[:, 1:]], 1),
            output_hidden_states=True,
        )
    torch.testing.assert_close(got.logits, wanted.logits, atol=1e-6, rtol=1e-6)
    for mine, full in zip(got.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(mine, torch.cat([full[:, :1], full[:, 4:]], 1), atol=1e-5, rtol=1e-5)


def test_the_prompt_is_seen_by_t5_s_decoder() -> None:
    """As if the embedded prompt had been part of the encoder's input, with a mask over it."""
    model = writer("t5")
    ours = new_smop(model, SmopConfig(prompts=1, length=3))
    batch, answer = tiny_batch("t5", rows=4), torch.tensor([[5, 6, 7]] * 4)
    adapted = attach(model, {"a": ours, "longer": new_smop(model, SmopConfig(prompts=1, length=6))})
    with torch.no_grad():
        with adapted.route("a"):
            got = logits(adapted, {**batch, "labels": answer})
        with adapted.route(["a", None, "longer", "a"]):
            mixed = logits(adapted, {**batch, "labels": answer})
        bare = logits(model, {**batch, "labels": answer})
    (prompt,) = ours.tensors.values()
    embedded = torch.cat([prompt.expand(4, -1, -1), model.shared(batch["input_ids"])], 1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (3, 0), value=1)
    adapted.detach()
    with torch.no_grad():
        wanted = logits(model, {"inputs_embeds": embedded, "attention_mask": mask, "labels": answer})
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[[0, 3]], wanted[[0, 3]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1], bare[1], atol=1e-5, rtol=1e-5)
    assert (mixed[2] - bare[2]).abs().max() > 1e-2


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", [*DECODERS, "t5"])
def test_generation_with_a_cache_is_generation_without(kind: str, beams: int) -> None:
    model = writer(kind)
    long, short = lively(model, length=5), lively(model, prompts=2, length=2, seed=3)
    adapted = attach(model, {"a": long, "b": short})
    batch = tiny_batch(kind, rows=4) if kind == "t5" else padded_left(tiny_batch(kind, rows=4))
    how: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    rows: list[Row] = ["a", None, "b", "a"]
    with adapted.route(rows):
        fast, slow = (adapted.generate(**batch, **how, use_cache=cache) for cache in (True, False))
    bare = model.generate(**batch, **how)
    assert torch.equal(fast, slow)
    assert torch.equal(fast[1], bare[1])
    assert not torch.equal(fast[[0, 2, 3]], bare[[0, 2, 3]])
    for number, row in enumerate(rows):
        with adapted.route([row]):
            alone = adapted.generate(**{key: value[number : number + 1] for key, value in batch.items()}, **how)
        assert torch.equal(alone[0], fast[number])


def test_logits_step_by_step_without_masks_or_positions_are_those_of_one_run() -> None:
    for kind in DECODERS:
        model = writer(kind)
        adapted = attach(model, {"a": lively(model), "b": lively(model, length=2, seed=1)})
        ids = tiny_batch(kind)["input_ids"][4:7, :8].clamp(min=3)
        first = torch.ones(3, 8).long()
        first[:, 5:] = 0
        with torch.no_grad():
            bare_cache = adapted(input_ids=ids, use_cache=True).past_key_values
        with adapted.route(["a", "b", None]), torch.no_grad():
            with reading(first):
                routed = adapted(input_ids=ids).logits
            cache, steps = None, []
            for start, stop in ((0, 5), (5, 6), (6, 8)):
                out = adapted(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), routed, atol=2e-5, rtol=1e-4)
        with pytest.raises(RouteError, match="start again with an empty one"), adapted.route("a"):
            adapted(input_ids=ids[:, :1], past_key_values=bare_cache)


def test_what_may_not_be_read_does_not_choose() -> None:
    """Otherwise a decoder would see in its prompt what it is to predict."""
    model = writer("llama")
    adapted = attach(model, {"a": lively(model)})
    ids = tiny_batch("llama")["input_ids"][5:6].repeat(12, 1)
    ids[:, 6] = torch.arange(12) * 4 + 3  # twelve answers behind one question
    may_read = torch.ones_like(ids)
    may_read[:, 6:] = 0
    with adapted.route("a"), torch.no_grad():
        free = logits(adapted, {"input_ids": ids})[:, :6]
        with reading(may_read):
            blind = logits(adapted, {"input_ids": ids})[:, :6]
    torch.testing.assert_close(blind, blind[:1].expand_as(blind), atol=1e-5, rtol=1e-5)
    assert (free - free[:1]).abs().max() > 1e-3


def test_the_gradient_reaches_the_router_through_the_weight_alone() -> None:
    """d loss / d W by hand: of w_i alone, as the choice itself has no gradient."""
    model = writer("gpt2")
    adapter = new_smop(model, SmopConfig(prompts=3, length=2))
    adapted = attach(model, {"a": adapter}).eval()
    adapted.train_only("a")
    batch = tiny_batch("gpt2", rows=3)
    with adapted.route("a"):
        logits(adapted, batch).square().sum().backward()
    weights = adapted.weights("a")
    path = "transformer.wte"
    gradient = weights[f"{path}.{ROUTER}"].grad
    assert gradient is not None
    assert gradient.abs().max() > 1e-6
    assert weights[f"{path}.{PROMPTS}"].grad is not None
    step = 1e-3 * gradient / gradient.norm()
    values = []
    for sign in (1, -1):
        moved = {**adapter.tensors, f"{path}.{ROUTER}": adapter.tensors[f"{path}.{ROUTER}"] + sign * step}
        adapted.add(f"m{sign}", replace(adapter, tensors=moved))
        with adapted.route(f"m{sign}"), torch.no_grad():
            values.append(float(logits(adapted, batch).square().sum()))
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(float(gradient.norm()), rel=0.05)
    adapted.detach()


def test_noise_acts_in_training_alone() -> None:
    model = spread_out(tiny_model("bert"))
    adapted = attach(model, {"a": lively(model)})
    batch = tiny_batch("bert")
    seen: list[Tensor] = []
    for mode in (False, False, True, True):
        adapted.train(mode)
        with adapted.route("a"), torch.no_grad(), routing_watched(lambda _o, _s, _r, w: seen.append(w)):
            adapted(**batch)
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[2], seen[3])


def test_it_leaves_the_model_as_it_came() -> None:
    for kind in ("bert", "t5", "llama"):
        model = tiny_model(kind)
        batch = tiny_batch(kind)
        with torch.no_grad():
            before, weights = logits(model, batch), {k: v.clone() for k, v in model.state_dict().items()}
            adapted = attach(model, {"a": lively(model), "low": make(model, LoraConfig())})
            with adapted.route("a"):
                assert not torch.allclose(logits(adapted, batch), before, atol=1e-6)
            with adapted.route(["low", None] * 4):
                beside = logits(adapted, batch)
            assert torch.equal(logits(adapted, batch), before)
            adapted.remove("a")
            with adapted.route(["low", None] * 4):
                assert torch.equal(logits(adapted, batch), beside)  # no row had a prompt: bit for bit
            adapted.detach()
            assert torch.equal(logits(model, batch), before)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
        hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
        assert hooks == []


def test_what_comes_out_is_what_went_in() -> None:
    model = tiny_model("roberta")
    adapter = lively(model)
    adapted = attach(model, {"a": adapter})
    back = adapted.extract("a")
    assert back.spec == adapter.spec
    assert {key: value.tolist() for key, value in back.tensors.items()} == {
        key: value.tolist() for key, value in adapter.tensors.items()
    }
    bare = transformers.RobertaModel(model.config).eval()
    bare.load_state_dict(model.roberta.state_dict(), strict=False)
    adapted.detach()
    loose = attach(bare, {"a": adapter}, check_base=False)  # the path has a prefix that this model lacks
    ids = tiny_batch("roberta")["input_ids"]
    with loose.route("a"), torch.no_grad():
        assert loose(input_ids=ids).last_hidden_state.shape == (8, 10, 32)
        assert loose(input_ids=ids, return_dict=False)[0].shape == (8, 10, 32)


def test_what_does_not_fit_is_named() -> None:
    model = tiny_model("bert")
    adapter = lively(model)
    adapted = attach(model, {"a": adapter, "b": lively(model, seed=1)})
    batch = tiny_batch("bert", rows=2)
    for row in ({"a": 0.5}, {"a": 1.0, "b": 1.0}):
        with pytest.raises(RouteError, match="one smop adapter, at weight 1"), adapted.route([row, None]):
            adapted(**batch)
    long = {"input_ids": torch.full((1, 510), 5)}
    too_long = r"510 tokens with a prompt of 4: .* 512 in all; cut texts to 508"
    with pytest.raises(ShapeError, match=too_long), adapted.route("a"):
        adapted(**long)
    with pytest.raises(UnsupportedAdapterError, match="attention mask of the shape"), adapted.route("a"):
        adapted(input_ids=batch["input_ids"], attention_mask=torch.ones(2, 1, 10, 10))
    adapted.detach()
    written = attach(writer("llama"), {"a": lively(writer("llama"))})
    with pytest.raises(UnsupportedAdapterError, match="a static cache has no room"), written.route("a"):
        written.generate(input_ids=batch["input_ids"][:1, :4], max_new_tokens=2, cache_implementation="static")
    with pytest.raises(UnsupportedAdapterError, match="no prompts for architecture 'vit'"):
        new_smop(tiny_model("vit"))
    wrong = {key: value[..., :16] for key, value in adapter.tensors.items()}
    with pytest.raises(ShapeError, match="wanted"):
        attach(model, {"a": replace(adapter, tensors=wrong)})
    for bad in ({"prompts": 0}, {"length": 0}, {"noise": -1.0}, {"spread": float("nan")}, {"width": 4}):
        with pytest.raises(ConfigError, match="wanted"):
            SmopConfig(**bad)
