"""What a model is called with, made longer for soft prompts, and what it returns, cut back.

In one batch rows have prompts of different lengths or none. All get as many slots as the longest prompt needs; a row's
own prompt fills the last of them, next to the text, the others are masked. Positions are told to the model row by row
and do not count masked slots, so each row sees what it would see alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftory.adapters.prompt_places import Positions
from graftory.errors import ShapeError, UnsupportedAdapterError


@dataclass(frozen=True, slots=True)
class Slots:
    """The slots of a batch."""

    lengths: Tensor
    """Soft tokens of each row, [rows]; 0 for one without a prompt."""
    size: int
    """Slots of every row: the largest length."""
    at: int
    """How many tokens stay in front of them."""

    def used(self) -> Tensor:
        """Which slots hold something, [rows, size]."""
        return torch.arange(self.size, device=self.lengths.device) >= self.size - self.lengths[:, None]

    def insert(self, text: Tensor, slots: Tensor) -> Tensor:
        """Put what belongs to the slots among what belongs to the text, both [rows, tokens, ...]."""
        return torch.cat([text[:, : self.at], slots.to(text.dtype), text[:, self.at :]], dim=1)

    def cut(self, value: Any, total: int) -> Any:
        """Take the slots out of all hidden states [rows, total, d] in what a model returned."""
        if isinstance(value, Tensor):
            if value.dim() != 3 or value.shape[1] != total:
                return value
            return torch.cat([value[:, : self.at], value[:, self.at + self.size :]], dim=1)
        return tuple(self.cut(item, total) for item in value) if type(value) is tuple else value


@dataclass(frozen=True, slots=True)
class Counting:
    """How a model counts positions."""

    kind: Positions
    padding_id: int = 0
    limit: int | None = None

    def of_text(self, ids: Tensor | None, mask: Tensor, given: Tensor | None, prompted: Tensor) -> Tensor:
        """The positions of the text alone, [rows, tokens].

        A row without a prompt gets those that the model itself would give it. In one with a prompt padding does not
        count, wherever it stands, so that the text follows its prompt.
        """
        if given is not None:
            return given.expand(mask.shape)
        if self.kind == "offset" and ids is not None:
            real = ids.ne(self.padding_id)
            return real.cumsum(1) * real + self.padding_id
        first = self.padding_id + 1 if self.kind == "offset" else 0
        plain = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        counted = (mask.ne(0).cumsum(1) - 1).clamp(min=0)
        return first + torch.where(prompted[:, None], counted, plain)

    def check(self, mask: Tensor, slots: Slots) -> None:
        """Check that text and prompt are not too long together.

        Raises:
            ShapeError: If they are.
        """
        if self.limit is None or mask.shape[1] + slots.size <= self.limit:
            return
        tokens = mask.ne(0).sum(1)
        worst = int((tokens + slots.lengths).argmax())
        if int(tokens[worst]) + int(slots.lengths[worst]) > self.limit:
            raise ShapeError(
                f"a text of {int(tokens[worst])} tokens with a prompt of {int(slots.lengths[worst])}: this base takes "
                f"{self.limit} in all; cut texts to {self.limit - slots.size} (max_length of the task)"
            )


def mask_of(values: dict[str, Any], tokens: Tensor) -> Tensor:
    """The attention mask [rows, tokens] that a model was called with, or ones.

    Raises:
        UnsupportedAdapterError: If it has another shape.
    """
    mask = values.get("attention_mask")
    if mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UnsupportedAdapterError(
            "prompts need an attention mask of the shape (rows, tokens), 1 for what may be seen; pass such a one"
        )
    return mask


def longer(values: dict[str, Any], embedded: Tensor, prompts: Tensor, slots: Slots, counting: Counting) -> Tensor:
    """Change what a model is called with so that it sees the prompts.

    Args:
        values: The arguments by name, changed in place.
        embedded: The embedded text, [rows, tokens, d].
        prompts: What fills the slots, [rows, slots.size, d].
        slots: The slots.
        counting: How the model counts positions.

    Returns:
        The mask of the text alone.
    """
    ids, mask = values.get("input_ids"), mask_of(values, embedded)
    counting.check(mask, slots)
    values["input_ids"] = None
    values["inputs_embeds"] = slots.insert(embedded, prompts)
    values["attention_mask"] = slots.insert(mask, slots.used())
    types = values.get("token_type_ids")
    if types is not None:
        types = types.expand(mask.shape)
        values["token_type_ids"] = slots.insert(types, types[:, :1].expand(-1, slots.size))
    if counting.kind != "relative":
        text = counting.of_text(ids, mask, values.get("position_ids"), slots.lengths.gt(0))
        values["position_ids"] = slots.insert(_shifted(text, slots), _of_slots(text, mask, slots))
    return mask


def _shifted(text: Tensor, slots: Slots) -> Tensor:
    """The text's positions with the prompt in front of all but the first tokens."""
    return torch.cat([text[:, : slots.at], text[:, slots.at :] + slots.lengths[:, None]], dim=1)


def _of_slots(text: Tensor, mask: Tensor, slots: Slots) -> Tensor:
    """The positions of the slots, [rows, size]; any for those that are masked."""
    first = mask.ne(0).long().argmax(1, keepdim=True)
    start = text[:, slots.at - 1] + 1 if slots.at else text.gather(1, first)[:, 0]
    number = torch.arange(slots.size, device=text.device) - (slots.size - slots.lengths[:, None])
    return start[:, None] + number.clamp(min=0)


def going_on(values: dict[str, Any], tokens: Tensor, past: int, slots: Slots, counting: Counting) -> None:
    """Change what a model is called with after its cache has taken up the prompts: mask and positions.

    Args:
        values: The arguments by name, changed in place.
        tokens: The new tokens, [rows, new] or [rows, new, d].
        past: Tokens in the cache, slots included.
        slots: The slots.
        counting: How the model counts positions.
    """
    new, whole = tokens.shape[1], past - slots.size + tokens.shape[1]
    mask = mask_of(values, tokens.new_empty(tokens.shape[0], whole))
    if mask.shape[1] != whole:
        raise ShapeError(
            f"the mask has {mask.shape[1]} tokens, cache and input {whole} besides the prompt; give a mask of all"
        )
    counting.check(mask, slots)
    text = values.get("position_ids")
    if text is None:
        text = counting.of_text(None, mask, None, slots.lengths.gt(0))[:, -new:]
    values["attention_mask"] = slots.insert(mask, slots.used())
    values["position_ids"] = text.expand(len(mask), -1) + slots.lengths[:, None]
