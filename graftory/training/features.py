"""Features of texts: the mean-pooled last hidden state of the frozen base, with no adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from graftory.data import Text
    from graftory.training import LoadedBase

_MAX_LENGTH = 128
"""One length for all rows, whatever their task: which task it is, is what the features are to tell."""


def features_of(loaded: LoadedBase, texts: Sequence[Text], *, batch_size: int = 32) -> Tensor:
    """f = Σ m_t h_t / Σ m_t over the tokens t of each text, with mask m and last hidden state h.

    Encoder-decoder models give the encoder's states.

    Args:
        loaded: The base and its tokenizer, no adapter attached.
        texts: Texts, or pairs of texts.
        batch_size: Rows at a time.

    Returns:
        [rows, width] fp32 on the CPU.
    """
    model: Any = loaded.model
    encoder: Any = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            parts = [
                _pooled(encoder, loaded, texts[start : start + batch_size])
                for start in range(0, len(texts), batch_size)
            ]
    finally:
        model.train(was_training)
    return torch.cat(parts).clone()


def _pooled(encoder: Any, loaded: LoadedBase, texts: Sequence[Text]) -> Tensor:
    tokenizer: Any = loaded.tokenizer
    first = [text if isinstance(text, str) else text[0] for text in texts]
    second = [text[1] for text in texts if not isinstance(text, str)] or None
    device = next(encoder.parameters()).device
    batch = tokenizer(first, second, padding=True, truncation=True, max_length=_MAX_LENGTH, return_tensors="pt").to(
        device
    )
    states = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return cast(Tensor, ((states * mask).sum(1) / mask.sum(1).clamp(min=1)).float().cpu())
