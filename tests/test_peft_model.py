"""A PeftModel with our mixed batch: held against the same model of PEFT's own, run adapter by adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import graftory
from graftory.adapters.banked_site import dropout_of
from graftory.errors import RouteError, UnsupportedAdapterError
from tests.conftest import tiny_batch, tiny_model

BASE = "__base__"
TARGETS = {
    "bert": ["query", "value", "intermediate.dense"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "t5": ["q", "v", "wo"],
}
ROWS = ("red", BASE, "green", "blue", "red", BASE, "blue", "green")
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Lora:
    """One adapter of a model under test."""

    rank: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: Sequence[str] | None = None


PLAIN = {"red": Lora(2), "green": Lora(5, {"use_rslora": True}), "blue": Lora(3)}
BIASED = {**PLAIN, "blue": Lora(3, {"lora_bias": True})}


def peft_model(kind: str, adapters: Mapping[str, Lora] = PLAIN, base: Any = None) -> Any:
    """A model of PEFT's with random adapters that learn, in evaluation mode."""
    model = None
    for seed, (name, lora) in enumerate(adapters.items()):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=7,
            target_modules=list(lora.targets or TARGETS[kind]),
            fan_in_fan_out=kind == "gpt2",
            init_lora_weights=False,
            **lora.options,
        )
        if model is None:
            model = peft.get_peft_model(tiny_model(kind) if base is None else base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "lora_" in path or "modules_to_save" in path:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    model.set_requires_grad(list(adapters))
    return model.eval()


def loss_of(logits: Tensor) -> Tensor:
    """A number to which rows add up, each with a gradient of its own."""
    return (logits * torch.linspace(-1, 2, logits[0].numel()).view(logits[0].shape)).sin().sum()


def part(batch: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    return {name: value[list(rows)] for name, value in batch.items()}


def by_adapter(model: Any, batch: Mapping[str, Tensor], names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """PEFT adapter by adapter: logits of all rows, and the gradient of every weight that learns."""
    logits: list[Tensor] = [torch.empty(0)] * len(names)
    gradients: dict[str, Tensor] = {}
    for name in dict.fromkeys(names):
        rows = [row for row, each in enumerate(names) if each == name]
        model.zero_grad()
        if name == BASE:
            with model.disable_adapter():
                output = model(**part(batch, rows)).logits
        else:
            model.set_adapter(name)
            output = model(**part(batch, rows)).logits
            loss_of(output).backward()
            gradients |= gradients_of(model)
        for row, each in zip(rows, output.detach(), strict=True):
            logits[row] = each
    model.zero_grad()
    model.set_requires_grad(list(model.peft_config))
    return torch.stack(logits), gradients


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def equal(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], within: float = 1e-5) -> None:
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert torch.allclose(got[name], value, atol=within, rtol=within), name


@pytest.mark.parametrize("kind", list(TARGETS))
@pytest.mark.parametrize("training", [False, True])
def test_logits_and_gradients_are_those_of_peft_adapter_by_adapter(kind: str, training: bool) -> None:
    # PEFT warns of a bias beside a layer that has none
    adapters = BIASED if kind in ("bert", "gpt2") else PLAIN
    # in fp64, where 1e-9 of a difference would be a fault and not rounding
    model, batch = still(peft_model(kind, adapters)).double(), tiny_batch(kind)
    wanted, gradients = by_adapter(model, batch, ROWS)
    assert len(gradients) > 12
    model.train(training)
    with graftory.mixed_batches(model):
        logits = model(**batch, adapter_names=list(ROWS)).logits
        loss_of(logits[[row for row, name in enumerate(ROWS) if name != BASE]]).backward()
    torch.testing.assert_close(logits, wanted, atol=1e-9, rtol=1e-9)
    equal(gradients_of(model), gradients, within=1e-9)
    with model.disable_adapter(), torch.no_grad():
        bare = model.eval()(**batch).logits
    assert (bare - logits).abs().amax(1)[[0, 2, 3]].min() > 1e-3


def still(model: Any) -> Any:
    """The model without the base's own dropout, so that training is not random."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if isinstance(getattr(module, "dropout_prob", None), float):
            module.dropout_prob = 0.0
    for name in ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    return model


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_rows_of_the_base_keep_their_bits(kind: str) -> None:
    model, batch = peft_model(kind), tiny_batch(kind)
    with torch.no_grad(), graftory.mixed_batches(model):
        with model.disable_adapter():
            bare = model(**batch).logits
        logits = model(**batch, adapter_names=list(ROWS)).logits
        alone = model(**batch, adapter_names=[BASE] * len(ROWS)).logits
    of_base = [row for row, name in enumerate(ROWS) if name == BASE]
    assert torch.equal(logits[of_base], bare[of_base])
    assert torch.equal(alone, bare)


def test_a_step_on_a_mixed_batch_is_the_steps_of_peft_on_its_parts() -> None:
    batch = tiny_batch("llama")
    theirs, ours = still(peft_model("llama")).train(), still(peft_model("llama")).train()
    for name in PLAIN:
        rows = [row for row, each in enumerate(ROWS) if each == name]
        theirs.set_adapter(name)
        optimizer = torch.optim.AdamW([w for n, w in theirs.named_parameters() if f".{name}." in n], lr=1e-2)
        loss_of(theirs(**part(batch, rows)).logits).backward()
        optimizer.step()
        optimizer.zero_grad()
    graftory.mixed_batches(ours)
    before = {name: weight.clone() for name, weight in ours.state_dict().items()}
    optimizer = torch.optim.AdamW([weight for weight in ours.parameters() if weight.requires_grad], lr=1e-2)
    loss_of(ours(**batch, adapter_names=list(ROWS)).logits).backward()
    optimizer.step()
    wanted = theirs.state_dict()
    moved = {name for name, weight in ours.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    for name in moved:
        # AdamW's first step is by the sign: gradients near zero would make a difference of rounding large
        assert ((ours.state_dict()[name] - wanted[name]).abs() > 1e-4).float().mean() < 0.01, name


def test_a_frozen_adapter_gets_no_gradient_and_others_do() -> None:
    model, batch = peft_model("bert"), tiny_batch("bert")
    model.set_requires_grad(["green"], requires_grad=False)
    with graftory.mixed_batches(model):
        loss_of(model.train()(**batch, adapter_names=list(ROWS)).logits).backward()
    assert {name.split(".lora_")[1].split(".")[1] for name in gradients_of(model)} == {"red", "blue"}


VARIANTS = {
    "red": Lora(2),
    "pink": Lora(3, {"use_dora": True}),
    "grey": Lora(4, {"use_dora": True, "use_rslora": True}),
}
VARIED = ("pink", "red", BASE, "grey", "pink", "red", "grey", BASE)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_dora_among_lora(kind: str) -> None:
    model, batch = still(peft_model(kind, VARIANTS)), tiny_batch(kind)
    wanted, gradients = by_adapter(model, batch, VARIED)
    assert any("magnitude" in name for name in gradients)
    with graftory.mixed_batches(model):
        logits = model.train()(**batch, adapter_names=list(VARIED)).logits
        loss_of(logits[[row for row, name in enumerate(VARIED) if name != BASE]]).backward()
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    equal(gradients_of(model), gradients)


def test_dora_on_all_rows() -> None:
    model, batch = peft_model("bert", VARIANTS), tiny_batch("bert")
    wanted, _ = by_adapter(model, batch, ["pink"] * 8)
    with graftory.mixed_batches(model), torch.no_grad():
        torch.testing.assert_close(model(**batch, adapter_names=["pink"] * 8).logits, wanted, atol=1e-5, rtol=1e-5)


def test_activated_lora_follows_its_rows() -> None:
    activated = Lora(3, {"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"})
    model = peft_model("llama", {"red": Lora(2, {"task_type": "CAUSAL_LM"}), "pink": activated}, causal("llama"))
    ids = tiny_batch("llama")["input_ids"].clone()
    ids[:, 2:4] = torch.tensor([7, 8])
    names = ["pink", "red", BASE, "pink", "pink", "red", "red", BASE]
    with torch.no_grad():
        wanted = model(input_ids=ids, adapter_names=names).logits  # PEFT's own mixed batch
        with graftory.mixed_batches(model):
            got = model(input_ids=ids, adapter_names=names).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_layers_may_lack_adapters_and_later_ones_may_bring_layers() -> None:
    batch = tiny_batch("bert")
    few = {"red": Lora(2, targets=["query"]), "green": Lora(3, targets=["value", "query"])}
    model = peft_model("bert", few)
    graftory.mixed_batches(model)
    more = peft.LoraConfig(r=2, target_modules=["key", "output.dense"], init_lora_weights=False)
    model.add_adapter("blue", more)
    with torch.no_grad():
        logits = model(**batch, adapter_names=list(ROWS)).logits
    graftory.undo_mixed_batches(model)
    wanted, _ = by_adapter(model, batch, ROWS)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)


def test_heads_are_as_in_peft() -> None:
    headed = {name: Lora(3, {"modules_to_save": ["classifier"]}) for name in ("red", "green", "blue")}
    model, batch = peft_model("bert", headed), tiny_batch("bert")
    names = ["red", "green", "blue", "red", "blue", BASE, "green", "green"]
    with torch.no_grad():
        theirs = model(**batch, adapter_names=names).logits
        with graftory.mixed_batches(model):
            ours = model(**batch, adapter_names=names).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with graftory.mixed_batches(model):
        loss_of(model.train()(**batch, adapter_names=names).logits).backward()
    assert sum("modules_to_save" in name for name in gradients_of(model)) == 6


@pytest.mark.parametrize(
    ("kind", "targets"), [("bert", ["word_embeddings", "query"]), ("vit", ["patch_embeddings.projection", "q_proj"])]
)
def test_embeddings_and_convolutions_are_as_in_peft_and_learn(kind: str, targets: list[str]) -> None:
    targets = ["word_embeddings", "query"]
    model, batch = (
        peft_model("bert", {name: Lora(3, targets=targets) for name in ("red", "green", "blue")}),
        tiny_batch("bert"),
    )
    wanted, gradients = by_adapter(still(model), batch, ROWS)
    assert any("embedding_A" in name for name in gradients)
    with graftory.mixed_batches(model):
        logits = model.train()(**batch, adapter_names=list(ROWS)).logits
        loss_of(logits[[row for row, name in enumerate(ROWS) if name != BASE]]).backward()
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    equal(gradients_of(model), gradients)


def test_dora_on_an_embedding_is_refused_by_name() -> None:
    model = peft_model("bert", {"red": Lora(2, {"use_dora": True}, ["word_embeddings", "query"])})
    with graftory.mixed_batches(model), pytest.raises(RouteError, match=r"embeddings\.word_embeddings: .*DoRA"):
        model(**tiny_batch("bert"), adapter_names=["red"] * 8)


# dropout


def test_dropout_is_each_adapters_own() -> None:
    model, batch = (
        still(peft_model("bert", {"red": Lora(2), "green": Lora(3, {"lora_dropout": 0.5})})),
        tiny_batch("bert"),
    )
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            vars(module.lora_dropout["green"])["p"] = 0.5
    names = ["red", "green"] * 4
    wanted, _ = by_adapter(model.eval(), batch, names)
    with graftory.mixed_batches(model), torch.no_grad():
        dry = model(**batch, adapter_names=names).logits
        wet = model.train()(**batch, adapter_names=names).logits
    torch.testing.assert_close(dry, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wet[::2], wanted[::2], atol=1e-5, rtol=1e-5)
    assert (wet[1::2] - wanted[1::2]).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("rates", [[0.0, 0.5, 1.0], [0.25, 0.25, 0.25]])
def test_dropout_keeps_what_it_says(rates: list[float]) -> None:
    torch.manual_seed(0)
    index = torch.tensor([0, 1, 2, 1])
    x = torch.ones(4, 50, 200)
    multipliers = dropout_of(rates, index[:, None], x.shape)
    dropped = x if multipliers is None else x * multipliers
    for row, adapter in enumerate(index.tolist()):
        kept = dropped[row] != 0
        assert kept.float().mean().item() == pytest.approx(1 - rates[adapter], abs=0.02)
        scale = 1 / (1 - rates[adapter]) if rates[adapter] < 1 else 0.0
        torch.testing.assert_close(dropped[row][kept], torch.full_like(dropped[row][kept], scale))


# generation


def causal(kind: str) -> Any:
    """A tiny random language model."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, **SPECIAL)
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "t5":
        special = {**SPECIAL, "decoder_start_token_id": 0}
        config = transformers.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **special)
        return transformers.T5ForConditionalGeneration(config).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=48, **SPECIAL)).eval()


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("several", [1, 2])
def test_beams_and_returned_sequences_follow_their_row(kind: str, typed: bool, several: int) -> None:
    task = {"task_type": "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"} if typed else {}
    model = peft_model(kind, {"red": Lora(3, task), "green": Lora(5, task)}, causal(kind))
    ids = torch.randint(3, 60, (3, 5), generator=torch.Generator().manual_seed(2))
    names = ["green", BASE, "red"]
    options = {"num_beams": 2, "num_return_sequences": several, "max_new_tokens": 6, "do_sample": False}
    with graftory.mixed_batches(model):
        mixed = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **options)
    assert len(mixed) == 3 * several
    for row, name in enumerate(names):
        if name != BASE:
            model.set_adapter(name)
        with model.disable_adapter() if name == BASE else graftory.mixed_batches(model):
            one = model.generate(input_ids=ids[[row]], attention_mask=torch.ones(1, 5, dtype=torch.long), **options)
        for got, wanted in zip(mixed[row * several : (row + 1) * several], one, strict=True):
            assert got[: len(wanted)].tolist() == wanted.tolist()


def test_sampled_sequences_follow_their_row() -> None:
    model = peft_model("gpt2", {"red": Lora(3), "green": Lora(5)}, causal("gpt2"))
    seen: list[int] = []
    model.base_model.model.lm_head.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    ids = torch.randint(3, 60, (2, 4), generator=torch.Generator().manual_seed(2))
    config = transformers.GenerationConfig(do_sample=True, num_return_sequences=3, max_new_tokens=3, **SPECIAL)
    with graftory.mixed_batches(model):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, adapter_names=["red", "green"]
        )
    assert out.shape[0] == 6
    assert set(seen) == {6}


# what it leaves behind


def kinds(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def snapshot(model: nn.Module) -> dict[str, list[str]]:
    return {path: sorted(vars(module)) for path, module in model.named_modules()}


def test_undo_leaves_the_model_as_it_was() -> None:
    model, batch = peft_model("bert", {"red": Lora(2, {"modules_to_save": ["classifier"]})}), tiny_batch("bert")
    before, attributes, text = kinds(model), snapshot(model), repr(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(**batch).logits
        graftory.mixed_batches(model)
        graftory.mixed_batches(model)
        assert kinds(model) != before
        assert repr(model) == text
        assert torch.equal(model(**batch).logits, logits), "without adapter_names everything is PEFT's"
        model(**batch, adapter_names=["red"] * 8)
        graftory.undo_mixed_batches(model)
        assert kinds(model) == before
        assert snapshot(model) == attributes
        assert torch.equal(model(**batch).logits, logits)
    graftory.undo_mixed_batches(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**batch, adapter_names=["red"] * 8)


def test_with_ends_what_it_began_and_nothing_else() -> None:
    model = peft_model("bert")
    before = kinds(model)
    with graftory.mixed_batches(model) as inside:
        assert inside is model
        given = kinds(model)
        with graftory.mixed_batches(model):
            pass
        assert kinds(model) == given
    assert kinds(model) == before
    with pytest.raises(ZeroDivisionError), graftory.mixed_batches(model):
        raise ZeroDivisionError
    assert kinds(model) == before


def fail(*_: object) -> None:
    raise ZeroDivisionError


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model, batch = peft_model("bert"), tiny_batch("bert")
    graftory.mixed_batches(model)
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    before, attributes = hooks(model), {path: dict(vars(module)) for path, module in model.named_modules()}
    with torch.no_grad():
        plain = model(**batch).logits
        handle = model.base_model.model.bert.encoder.layer[1].register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(**batch, adapter_names=list(ROWS))
        handle.remove()
        assert hooks(model) == before
        assert {path: dict(vars(module)) for path, module in model.named_modules()} == attributes
        assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_the_same_rows_again(reentrant: bool) -> None:
    batch = tiny_batch("bert")
    model = still(peft_model("bert")).train()
    _, wanted = by_adapter(model, batch, ROWS)
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with graftory.mixed_batches(model):
        logits = model(**batch, adapter_names=list(ROWS)).logits
        loss_of(logits[[row for row, name in enumerate(ROWS) if name != BASE]]).backward()
    equal(gradients_of(model), wanted)


def test_a_copy_has_calls_of_its_own() -> None:
    model, batch = peft_model("bert"), tiny_batch("bert")
    graftory.mixed_batches(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        wanted = model(**batch, adapter_names=list(ROWS)).logits
        graftory.undo_mixed_batches(model)
        assert torch.equal(twin(**batch, adapter_names=list(ROWS)).logits, wanted)


# errors


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["red"] * 7 + ["nobody"], r"no adapter 'nobody' in the model; it has red, green, blue, __base__"),
        (["red"] * 7, "has 7 names, the batch 8 rows"),
        (["red"] * 4, "has 4 names, the batch 8 rows"),
        ("red", "wanted a list with a name for each row"),
        ([None] * 8, "wanted a list with a name for each row"),
        ([], "wanted a list with a name for each row"),
    ],
)
def test_wrong_names_are_refused(names: Any, said: str) -> None:
    model = peft_model("bert")
    with graftory.mixed_batches(model), pytest.raises(RouteError, match=said):
        model(**tiny_batch("bert"), adapter_names=names)


def test_merged_adapters_are_refused() -> None:
    model = peft_model("bert")
    model.merge_adapter(["red"])
    with graftory.mixed_batches(model), pytest.raises(RouteError, match=r"query: .*call `unmerge_adapter` first"):
        model(**tiny_batch("bert"), adapter_names=list(ROWS))


def test_disabled_adapters_are_the_base() -> None:
    model, batch = peft_model("bert"), tiny_batch("bert")
    with graftory.mixed_batches(model), model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**batch, adapter_names=list(ROWS)).logits, model(**batch).logits)


def of_ia3() -> Any:
    config = peft.IA3Config(target_modules=["key"], feedforward_modules=[])
    return peft.get_peft_model(tiny_model("bert"), config)


@pytest.mark.parametrize("make", [lambda: tiny_model("bert"), of_ia3], ids=["no PeftModel", "IA3"])
@pytest.mark.parametrize("call", [graftory.mixed_batches, graftory.undo_mixed_batches])
def test_other_models_are_refused(make: Callable[[], Any], call: Callable[[Any], object]) -> None:
    with pytest.raises(UnsupportedAdapterError, match="wanted a PeftModel with LoRA adapters"):
        call(make())
