"""Features of texts: mean-pooled hidden states of the frozen base, with no adapter: the last, or those of any layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftory.training.encode import Collator, Example, by_length, in_order

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
        batch_size: Rows at a time; rows of like length go together.

    Returns:
        [rows, width] fp32 on the CPU.
    """
    return _read(loaded, texts, batch_size, lambda output, mask: _pooled(output.last_hidden_state, mask))


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

    def pooled(output: Any, mask: Tensor) -> Tensor:
        return torch.stack([_pooled(output.hidden_states[layer], mask) for layer in layers], 1)

    return _read(loaded, texts, batch_size, pooled, states=True)


def depth_of(loaded: LoadedBase) -> int:
    """How many layers the base has, of the encoder where there are two stacks."""
    config: Any = loaded.model.config
    layers = getattr(config, "num_layers", None) if config.is_encoder_decoder else None
    return int(config.num_hidden_layers if layers is None else layers)


def width_of(loaded: LoadedBase) -> int:
    """How wide the base's hidden states are."""
    config: Any = loaded.model.config
    return int(config.hidden_size)


def _read(
    loaded: LoadedBase,
    texts: Sequence[Text],
    batch_size: int,
    read: Callable[[Any, Tensor], Tensor],
    *,
    states: bool = False,
) -> Tensor:
    """What is read of the encoder's output for each text, given which tokens are no padding; texts of as many tokens go
    together, so that little is padding.
    """
    model: Any = loaded.model
    encoder: Any = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    examples = _examples(loaded, texts)
    groups = by_length(examples, batch_size)
    collate, device = Collator(loaded.tokenizer.pad_token_id), next(encoder.parameters()).device
    parts = []
    was_training = model.training
    model.eval()
    try:
        for rows in groups:
            batch = {name: value.to(device) for name, value in collate([examples[row] for row in rows]).items()}
            with torch.inference_mode():
                output = encoder(**batch, output_hidden_states=states)
            parts.append(read(output, batch["attention_mask"]))
    finally:
        model.train(was_training)
    return in_order(torch.cat(parts), groups)


def _examples(loaded: LoadedBase, texts: Sequence[Text]) -> list[Example]:
    first = [text if isinstance(text, str) else text[0] for text in texts]
    second = [text[1] for text in texts if not isinstance(text, str)] or None
    tokenizer: Any = loaded.tokenizer
    encoded = tokenizer(first, second, truncation=True, max_length=_MAX_LENGTH)
    pairs = zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in pairs]


def _pooled(states: Tensor, attention: Tensor) -> Tensor:
    mask = attention.unsqueeze(-1).to(states.dtype)
    return ((states * mask).sum(1) / mask.sum(1).clamp(min=1)).float().cpu()
