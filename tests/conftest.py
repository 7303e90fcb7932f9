"""Tiny random models of every architecture, and inputs for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

# before anything imports Triton, which decides then, and for the whole process
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests import interpreted

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()

_TEXT: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_DECODER: dict[str, Any] = {"decoder_start_token_id": 0}
_SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

TINY: Mapping[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**_TEXT)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**_TEXT)),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(vocab_size=60, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    ),
    "gpt2": lambda: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, **_SPECIAL)
    ),
    "llama": lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**_TEXT, **_SPECIAL)),
    "qwen2": lambda: transformers.Qwen2ForSequenceClassification(
        transformers.Qwen2Config(**_TEXT, **_SPECIAL, num_key_value_heads=2)
    ),
    "t5": lambda: transformers.T5ForSequenceClassification(
        transformers.T5Config(
            vocab_size=60,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            eos_token_id=2,
            pad_token_id=0,
            **_DECODER,
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
        )
    ),
}
"""A classification model of every architecture, hidden 32, two layers."""

RELATIVES: Mapping[str, Callable[[], PreTrainedModel]] = {
    "camembert": lambda: transformers.CamembertForSequenceClassification(transformers.CamembertConfig(**_TEXT)),
    "electra": lambda: transformers.ElectraForSequenceClassification(
        transformers.ElectraConfig(**_TEXT, embedding_size=16)
    ),
    "mistral": lambda: transformers.MistralForSequenceClassification(
        transformers.MistralConfig(**_TEXT, **_SPECIAL, num_key_value_heads=2)
    ),
    "qwen3": lambda: transformers.Qwen3ForSequenceClassification(
        transformers.Qwen3Config(**_TEXT, **_SPECIAL, num_key_value_heads=2, head_dim=8)
    ),
    "xlm-roberta": lambda: transformers.XLMRobertaForSequenceClassification(transformers.XLMRobertaConfig(**_TEXT)),
}
"""Models that share a row of the table of architectures with one of the above."""


def tiny_model(kind: str, seed: int = 0) -> Any:
    """A tiny random model in evaluation mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return {**TINY, **RELATIVES}[kind]().eval()


def tiny_batch(kind: str, rows: int = 8, seed: int = 1) -> dict[str, Tensor]:
    """Inputs for a tiny model: padded token ids of different lengths, or images."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 60, (rows, 10), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        length = 5 + row % 6
        ids[row, length - 1] = 2  # T5 classifies at the end-of-sequence token
        ids[row, length:] = 0
        mask[row, length:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(params=list(TINY))
def kind(request: pytest.FixtureRequest) -> str:
    """Every architecture in turn."""
    name: str = request.param
    return name


@pytest.fixture
def guarded(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels whose memory has NaN around it; a test module's own `launch` says whose."""
    with interpreted.guarded(launch, monkeypatch):
        yield
