"""Where soft prompts enter a model, per architecture: a table of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from graftory.adapters.architectures import matching
from graftory.errors import UnsupportedAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Positions = Literal["learned", "offset", "rotary", "relative"]


@dataclass(frozen=True, slots=True)
class PromptPlace:
    """How prompts enter the models of one family."""

    model_types: tuple[str, ...]
    """`config.model_type` of the models this row is for."""
    embedding: str
    """End of the path of the input embeddings."""
    at: int
    """How many tokens stay in front of the prompt."""
    positions: Positions
    """`learned`: position embeddings, counted from 0; `offset`: counted over the tokens that are no padding, from
    padding_idx + 1; `rotary`: no limit; `relative`: the model is not told positions."""
    stack: str = ""
    """Path, in the backbone, of what takes the embedded input, if that is not the backbone itself."""


PROMPT_PLACES = (
    # behind [CLS], so that it stays the token at position 0 that poolers and heads read
    PromptPlace(("bert", "electra", "distilbert"), "embeddings.word_embeddings", 1, "learned"),
    PromptPlace(("roberta", "xlm-roberta", "camembert"), "embeddings.word_embeddings", 1, "offset"),
    PromptPlace(("gpt2",), "wte", 0, "learned"),
    PromptPlace(("llama", "qwen2", "qwen3", "mistral"), "embed_tokens", 0, "rotary"),
    PromptPlace(("t5",), "shared", 0, "relative", "encoder"),
)


def prompt_place(model: PreTrainedModel) -> PromptPlace:
    """The row for a model.

    Raises:
        UnsupportedAdapterError: If there is none.
    """
    kind = model.config.model_type
    for row in PROMPT_PLACES:
        if kind in row.model_types:
            return row
    known = ", ".join(sorted(kind for row in PROMPT_PLACES for kind in row.model_types))
    raise UnsupportedAdapterError(
        f"no prompts for architecture {kind!r}; known: {known}; train a lora or bottleneck adapter on this model"
    )


def embedding_path(model: PreTrainedModel) -> str:
    """The path of the input embeddings."""
    place = prompt_place(model)
    found = (path for path, _ in matching((name for name, _ in model.named_modules()), [place.embedding]))
    path = next(found, None)
    if path is None:
        raise UnsupportedAdapterError(f"{type(model).__name__} has no input embeddings called {place.embedding}")
    return path


def stacks_of(model: PreTrainedModel) -> tuple[nn.Module, nn.Module | None]:
    """The module that takes the embedded input, and the decoder that reads its output if there is one."""
    whole: nn.Module = model.base_model
    path = prompt_place(model).stack
    return whole.get_submodule(path), getattr(whole, "decoder", None) if path else None


def position_limit(model: PreTrainedModel) -> int | None:
    """How many tokens a row may have, prompt and text; None if there is no such limit."""
    place, config = prompt_place(model), model.config
    limits: Mapping[Positions, int] = {
        "learned": int(getattr(config, "max_position_embeddings", 0)),
        "offset": int(getattr(config, "max_position_embeddings", 0)) - int(getattr(config, "pad_token_id", 0) or 0) - 1,
    }
    return limits.get(place.positions)
