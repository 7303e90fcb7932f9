"""Real models exported from their files and loaded by transformers alone: logits within 1e-4 of base + adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from graftory.adapter import BaseModel, TaskKind
from graftory.adapters import attach
from graftory.compose import export_folder
from graftory.config import LoraConfig
from graftory.data import sample_model
from tests.adapter_samples import make

CASES: list[tuple[str, TaskKind, Any]] = [
    ("minilm", "classification", transformers.AutoModelForSequenceClassification),
    ("smollm2", "causal_lm", transformers.AutoModelForCausalLM),
    ("t5", "seq2seq", transformers.AutoModelForSeq2SeqLM),
]


@pytest.mark.real
@pytest.mark.parametrize(("name", "kind", "auto"), CASES)
def test_transformers_alone_loads_what_was_exported(tmp_path: Path, name: str, kind: TaskKind, auto: Any) -> None:
    folder = sample_model(name)
    base = auto.from_pretrained(folder, dtype=torch.float32, **({"num_labels": 2} if kind == "classification" else {}))
    shaken = make(base.eval(), LoraConfig(rank=4), labels=3 if kind == "classification" else 0)
    small = {key: 0.1 * tensor if ".lora_B" in key else tensor for key, tensor in shaken.tensors.items()}
    # another test compares fingerprints; here they would only be read once more
    adapter = replace(shaken, spec=replace(shaken.spec, base=BaseModel(f"wheel:{name}")), tensors=small)
    export_folder(f"wheel:{name}", adapter, tmp_path / "plain", kind=kind, max_shard_size="100MB")
    ids = torch.arange(100, 124).reshape(2, 12)
    batch = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if kind == "seq2seq" else {})
    with torch.no_grad():
        bare = base(**batch).logits
        adapted = attach(base, {"a": adapter})
        with adapted.route("a"):
            wanted = adapted(**batch).logits
        got = auto.from_pretrained(tmp_path / "plain").eval()(**batch).logits
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= 1e-4
    assert bare.shape != wanted.shape or (bare - wanted).abs().max() > 0.1
    assert (tmp_path / "plain" / "tokenizer.json").is_file()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")("moon").input_ids
