"""Features of texts: mean-pooled hidden states of the frozen base, with no adapter: the last, or those of any layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

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
    groups = [range(start, min(start + batch_size, len(texts))) for start in _starts(texts, batch_size)]
    batches = _batches(loaded, groups, texts)
    return torch.cat([_pooled(output.last_hidden_state, mask) for output, mask in batches]).clone()


def layer_features_of(
    loaded: LoadedBase, texts: Sequence[Text], layers: Sequence[int], *, batch_size: int = 32
) -> Tensor:
    """The same at several layers, from one forward pass.

    Args:
        loaded: The base and its tokenizer.
        texts: Texts, or pairs of texts.
        layers: Numbers of hidden states: 0 are the embeddings, the last is `depth_of`.
        batch_size: Rows at a time; rows of like length go together.

    Returns:
        [rows, layers, width] fp32 on the CPU.
    """
    order = sorted(range(len(texts)), key=lambda row: len("".join(texts[row])))
    groups = [order[start : start + batch_size] for start in _starts(texts, batch_size)]
    features = torch.empty(len(texts), len(layers), width_of(loaded))
    for rows, (output, mask) in zip(groups, _batches(loaded, groups, texts, states=True), strict=True):
        features[rows] = torch.stack([_pooled(output.hidden_states[layer], mask) for layer in layers], 1)
    return features


def depth_of(loaded: LoadedBase) -> int:
    """How many layers the base has, of the encoder where there are two stacks."""
    config: Any = loaded.model.config
    layers = getattr(config, "num_layers", None) if config.is_encoder_decoder else None
    return int(config.num_hidden_layers if layers is None else layers)


def width_of(loaded: LoadedBase) -> int:
    """How wide the base's hidden states are."""
    config: Any = loaded.model.config
    return int(config.hidden_size)


def _starts(texts: Sequence[Text], batch_size: int) -> range:
    return range(0, len(texts), batch_size)


def _batches(
    loaded: LoadedBase, groups: Sequence[Sequence[int]], texts: Sequence[Text], *, states: bool = False
) -> Iterator[tuple[Any, Tensor]]:
    """What the encoder gives for each group of rows, and which tokens are no padding."""
    model: Any = loaded.model
    encoder: Any = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    was_training = model.training
    model.eval()
    try:
        for rows in groups:
            batch = _tokens(loaded, [texts[row] for row in rows], next(encoder.parameters()).device)
            mask = batch["attention_mask"]
            with torch.inference_mode():
                output = encoder(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=states)
            yield output, mask
    finally:
        model.train(was_training)


def _tokens(loaded: LoadedBase, texts: Sequence[Text], device: torch.device) -> Any:
    tokenizer: Any = loaded.tokenizer
    first = [text if isinstance(text, str) else text[0] for text in texts]
    second = [text[1] for text in texts if not isinstance(text, str)] or None
    return tokenizer(first, second, padding=True, truncation=True, max_length=_MAX_LENGTH, return_tensors="pt").to(
        device
    )


def _pooled(states: Tensor, attention: Tensor) -> Tensor:
    mask = attention.unsqueeze(-1).to(states.dtype)
    return ((states * mask).sum(1) / mask.sum(1).clamp(min=1)).float().cpu()
