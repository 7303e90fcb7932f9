"""Prompt tuning: PEFT's own answers on decoders and T5, SMoP with one prompt, mixed batches beside other methods."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from graftory import Adapter, BottleneckConfig, Hub, LoraConfig, attach, export, new_adapter
from graftory.adapters import Row
from graftory.compose.smop import new_smop
from graftory.config import BitfitConfig, DoraConfig, Ia3Config, PromptConfig, SmopConfig
from graftory.errors import ConfigError, MergeError, UnsupportedAdapterError
from tests.adapter_samples import logits, make, mixed_as_single
from tests.conftest import tiny_batch, tiny_model

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
T5: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def writer(kind: str) -> Any:
    """A tiny random model that writes, in double precision."""
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, initializer_range=0.2)),
        "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    }
    return made[kind]().eval().double()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_logits_are_those_of_peft(kind: str) -> None:
    batch = tiny_batch(kind)
    task_type = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    if kind == "t5":
        batch["labels"] = batch["input_ids"][:, :4].clone()
    config = peft.PromptTuningConfig(task_type=task_type, num_virtual_tokens=3, num_transformer_submodules=1)
    theirs: Any = peft.get_peft_model(writer(kind), config).eval()
    with torch.no_grad():
        prompt = torch.randn(3, 32, generator=torch.Generator().manual_seed(4)).double()
        theirs.prompt_encoder.default.embedding.weight.copy_(prompt)
        expected = theirs(**batch).logits
    model = writer(kind)
    fresh = new_adapter(model, PromptConfig(length=3))
    (key,) = fresh.tensors
    adapted = attach(model, {"prompt": replace(fresh, tensors={key: prompt[None]})}, check_base=False)
    with adapted.route("prompt"), torch.no_grad():
        found = adapted(**batch).logits
    with torch.no_grad():
        bare = model(**batch).logits
    seen = torch.ones(found.shape[:2], dtype=torch.bool) if kind == "t5" else batch["attention_mask"].bool()
    theirs_on_text = expected if kind == "t5" else expected[:, 3:]
    torch.testing.assert_close(found[seen], theirs_on_text[seen], atol=1e-5, rtol=1e-5)
    assert (found[seen] - bare[seen]).abs().max() > 1e-2


def test_it_is_smop_with_one_prompt() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    one = new_smop(model, SmopConfig(prompts=1, length=4))
    prompt = new_adapter(model, PromptConfig(length=4, start="normal"))
    assert prompt.tensors.keys() == one.tensors.keys()
    same = replace(prompt, tensors=one.tensors)
    adapted = attach(model, {"smop": one, "prompt": same})
    found = []
    for name in adapted.names:
        with adapted.route(name), torch.no_grad():
            found.append(logits(adapted, batch))
    assert torch.equal(*found)


def test_a_fresh_prompt_is_words_of_the_vocabulary_or_noise() -> None:
    model = tiny_model("bert")
    words = model.bert.embeddings.word_embeddings.weight
    (prompt,) = new_adapter(model, PromptConfig(length=5)).tensors.values()
    assert all(any(torch.equal(token, word) for word in words) for token in prompt[0])
    (again,) = new_adapter(model, PromptConfig(length=5)).tensors.values()
    (other,) = new_adapter(model, PromptConfig(length=5, init_seed=1)).tensors.values()
    assert torch.equal(prompt, again)
    assert not torch.equal(prompt, other)
    (noise,) = new_adapter(model, PromptConfig(length=50, start="normal", spread=2.0)).tensors.values()
    assert 1.8 < float(noise.std()) < 2.2


def seven(model: Any) -> dict[str, Adapter]:
    """One adapter of each method that trains from rows."""
    configs = {
        "lora": LoraConfig(rank=3, targets=("all",)),
        "neck": BottleneckConfig(size=5),
        "houlsby": BottleneckConfig(size=3, placement="houlsby"),
        "ia3": Ia3Config(),
        "bitfit": BitfitConfig(),
        "dora": DoraConfig(rank=2),
        "prompt": PromptConfig(length=4),
    }
    made = {name: make(model, config, labels=2, seed=seed) for seed, (name, config) in enumerate(configs.items())}
    return {
        name: replace(each, tensors={key: value.double() for key, value in each.tensors.items()})
        for name, each in made.items()
    }


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "qwen2"])
def test_seven_methods_in_one_batch_equal_their_single_runs_with_gradients(kind: str) -> None:
    model = tiny_model(kind)
    rows: list[Row] = ["prompt", "lora", None, "ia3", "neck", "bitfit", "dora", "houlsby", "prompt"]
    batch = tiny_batch(kind, rows=len(rows))
    adapted = attach(model.double(), seven(model), check_base=False)
    adapted.train_only(*adapted.names)
    found = mixed_as_single(adapted, rows, batch, 1e-9)
    compared = sum(bool(grad.abs().max() > 1e-9) for grad in found.values())
    assert compared > 20


def test_a_hub_keeps_it_and_it_travels(tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    adapter = make(tiny_model("bert"), PromptConfig(length=4), labels=3)
    back = hub.get(hub.put("mine", adapter))
    assert back.spec == adapter.spec
    assert all(torch.equal(back.tensors[key], value) for key, value in adapter.tensors.items())
    out = hub.materialize("mine@1", tmp_path / "out")
    assert str(hub.add(out, name="mine")) == "mine@1"


def test_what_cannot_be_is_refused() -> None:
    model = tiny_model("bert")
    with pytest.raises(UnsupportedAdapterError, match=r"enters at bert\.embeddings\.word_embeddings and nowhere else"):
        new_adapter(model, PromptConfig(targets=("bert.encoder.layer.0.output.dense",)))
    with pytest.raises(UnsupportedAdapterError, match="no prompts for architecture 'vit'"):
        new_adapter(tiny_model("vit"), PromptConfig())
    with pytest.raises(ConfigError, match="length: got 0"):
        PromptConfig(length=0)
    with pytest.raises(MergeError, match="is a prompt in the input"):
        export(model, new_adapter(model, PromptConfig()))
