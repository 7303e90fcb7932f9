"""Adapters that are mixed row by row, with weights that are taken from the row itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftory.adapter import Adapter, TaskKind
from graftory.training.losses import readable_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weigh = Callable[[Tensor], Tensor]
"""From features of rows, [rows, width], to weights, [rows, adapters]."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """What answers a row: Σ_i a_i(x) · adapter i."""

    adapters: tuple[Adapter, ...]
    weigh: Weigh


def embedded(model: PreTrainedModel, kind: TaskKind, batch: Mapping[str, Tensor]) -> Tensor:
    """e(x): the largest value of each dimension over the input embeddings of a row's tokens, padding left out.

    Of a causal language model only the tokens that it is not to predict count.

    Returns:
        [rows, width], fp32, where the model is.
    """
    ids = batch["input_ids"].to(model.device)
    counted = batch["attention_mask"].to(model.device).bool()
    readable = readable_tokens(kind, batch)
    if readable is not None:
        counted = counted & readable.to(model.device)
    with torch.no_grad():
        table = model.get_input_embeddings()
        states: Tensor = table(ids).float()
    return states.masked_fill(~counted.unsqueeze(-1), float("-inf")).amax(1)
