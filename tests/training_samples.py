"""Tiny random bases with a tokenizer, saved as folders, and tasks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from graftory.adapter import TaskKind
from graftory.data import DataSource, Rows, TaskFile
from graftory.training import LoadedBase, load_base

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [f"w{number}" for number in range(40)]
_SIZES: dict[str, Any] = {"vocab_size": len(SPECIAL) + len(WORDS), "bos_token_id": 1, "eos_token_id": 2}
_SPREAD = 0.2
"""Of the random weights; with the usual 0.02 a model this small passes on next to nothing."""
_TEMPLATES = {"bert": ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"), "t5": ("$A </s>", "$A $B </s>")}


def tokenizer_of(family: str) -> Any:
    """One token a word, and each family's own special tokens."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if family in _TEMPLATES:
        single, pair = _TEMPLATES[family]
        special = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    known = {"eos_token": "</s>", "unk_token": "<unk>"} | ({} if family == "gpt2" else {"pad_token": "<pad>"})
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if family == "bert" else [])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **known)


def _bert() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": _SPREAD}
    settings: dict[str, Any] = {**_SIZES, **sizes, **rates, "pad_token_id": 0}
    return transformers.BertModel(transformers.BertConfig(**settings))


def _gpt2() -> Any:
    rates: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": _SPREAD}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**_SIZES, **rates, n_embd=32, n_layer=2, n_head=4))


def _t5() -> Any:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    settings: dict[str, Any] = {**_SIZES, **sizes, "pad_token_id": 0, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**settings))


_FAMILIES = {"bert": _bert, "gpt2": _gpt2, "t5": _t5}
FAMILY_OF_KIND: dict[TaskKind, str] = {
    "classification": "bert",
    "regression": "bert",
    "causal_lm": "gpt2",
    "seq2seq": "t5",
}


def save_base(family: str, folder: Path) -> str:
    """A tiny model and its tokenizer, as `from_pretrained` wants them."""
    torch.manual_seed(0)
    _FAMILIES[family]().save_pretrained(folder)
    tokenizer_of(family).save_pretrained(folder)
    return str(folder)


def tiny_base(kind: TaskKind, folder: Path) -> LoadedBase:
    """A tiny base for a kind of task."""
    return load_base(save_base(FAMILY_OF_KIND[kind], folder), kind)


def tiny_task(kind: TaskKind, **changes: Any) -> TaskFile:
    """A task whose rows are given by `tiny_rows`."""
    column = {"label": "label"} if kind in ("classification", "regression") else {"target": "target"}
    return TaskFile(**{"name": "tiny", "kind": kind, "data": DataSource(train="none.csv"), **column, **changes})


def tiny_rows(kind: TaskKind, rows: int = 24, labels: int = 3) -> Rows:
    """Rows whose target can be told from their words, six for each label; lengths differ."""
    texts = tuple(
        " ".join(WORDS[row % labels * 6 + (row * 5 + place) % 6] for place in range(3 + row % 5)) for row in range(rows)
    )
    names = tuple(f"label {number}" for number in range(labels)) if kind == "classification" else ()
    targets: dict[str, tuple[int | float | str, ...]] = {
        "classification": tuple(row % labels for row in range(rows)),
        "regression": tuple(float(row % labels) for row in range(rows)),
    }
    words = tuple(f"w{30 + row % labels} w{35 + row % labels}" for row in range(rows))
    return Rows("train", texts, targets.get(kind, words), names)
