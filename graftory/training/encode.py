"""Rows to tensors: tokens and labels for every kind of task, padded batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from graftory.adapter import TaskInfo, TaskKind
from graftory.data import Text
from graftory.errors import ConfigError

Example = dict[str, Any]
"""One encoded row: lists of token values, and a number or a list as `labels` if the target is known."""

IGNORED = -100
"""Label of positions that count in no loss."""

TASK_NUMBER = "task_number"
"""Part of the rows of a batch that mixes tasks: which of them a row is of. Models are not shown it."""

COUNTED = "counted"
"""Part of the rows where several processes train: 1, or 0 for one that only fills a batch. Models are not shown it."""

_PADDING: Mapping[str, int] = {"attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def encode(tokenizer: Any, task: TaskInfo, text: Text, target: int | float | str | None = None) -> Example:
    """Encode one row.

    Classification and regression: the text, or pair, cut to `max_length` tokens. Sequence to sequence: the
    prompt and the target, each cut. Causal: prompt, target and end token in one sequence; only the target
    and the end token have labels; if it is too long the prompt loses its beginning, then the target its end.

    Args:
        tokenizer: Of the base model.
        task: Kind, length and template.
        text: The input.
        target: Its target, if known.
    """
    return _ENCODERS[task.kind](tokenizer, task, text, target)


def prompt_of(task: TaskInfo, text: Text) -> str:
    """The input as a language model reads it."""
    first, second = (text, "") if isinstance(text, str) else text
    return task.template.format(text=first, pair=second)


def _encode_for_head(tokenizer: Any, task: TaskInfo, text: Text, target: Any) -> Example:
    pair = (text,) if isinstance(text, str) else text
    encoded = tokenizer(*pair, truncation=True, max_length=task.max_length)
    return _with_labels(encoded, target)


def _encode_seq2seq(tokenizer: Any, task: TaskInfo, text: Text, target: Any) -> Example:
    encoded = tokenizer(prompt_of(task, text), truncation=True, max_length=task.max_length)
    labels = target
    if target is not None:
        labels = tokenizer(text_target=str(target), truncation=True, max_length=task.max_length)["input_ids"]
    return _with_labels(encoded, labels)


def _encode_causal(tokenizer: Any, task: TaskInfo, text: Text, target: Any) -> Example:
    prompt = prompt_of(task, text)
    ids = list(tokenizer(prompt)["input_ids"])
    answer: list[int] = []
    if target is not None:
        gap = "" if prompt[-1:].isspace() else " "
        answer = [*tokenizer(f"{gap}{target}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        answer = answer[: task.max_length - 1]
    ids = ids[max(0, len(ids) - (task.max_length - len(answer))) :]
    example: Example = {"input_ids": ids + answer, "attention_mask": [1] * (len(ids) + len(answer))}
    if target is not None:
        example["labels"] = [IGNORED] * len(ids) + answer
    return example


def _with_labels(encoded: Mapping[str, Any], labels: Any) -> Example:
    example = {name: list(encoded[name]) for name in _INPUTS if name in encoded}
    return example if labels is None else {**example, "labels": labels}


_ENCODERS: Mapping[TaskKind, Callable[[Any, TaskInfo, Text, Any], Example]] = {
    "classification": _encode_for_head,
    "regression": _encode_for_head,
    "causal_lm": _encode_causal,
    "seq2seq": _encode_seq2seq,
}


def by_length(examples: Sequence[Example], size: int) -> list[list[int]]:
    """The numbers of the rows, so many at a time and the shortest first: little of such a batch is padding."""
    order = sorted(range(len(examples)), key=lambda row: len(examples[row]["input_ids"]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def in_order(found: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """What was found for the rows of one group after the other, by the numbers of the rows."""
    numbers = torch.tensor([row for group in groups for row in group], device=found.device)
    return torch.empty_like(found).index_copy_(0, numbers, found)


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads encoded rows to the longest of the batch."""

    pad_id: int
    side: Literal["left", "right"] = "right"
    """Left for generation: every prompt ends where the answer begins."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The batch, [rows, longest]; labels that are one number a row become [rows].

        Raises:
            ConfigError: If the rows do not have the same parts.
        """
        names = list(examples[0])
        if any(list(example) != names for example in examples):
            raise ConfigError("rows with and without targets, or of several kinds of task, do not go in one batch")
        return {name: self._column(name, [example[name] for example in examples]) for name in names}

    def _column(self, name: str, values: list[Any]) -> Tensor:
        if not isinstance(values[0], list):
            return torch.tensor(values)
        longest = max(map(len, values))
        fill = self.pad_id if name == "input_ids" else _PADDING[name]
        rows = []
        for value in values:
            padding = [fill] * (longest - len(value))
            rows.append(padding + value if self.side == "left" else value + padding)
        return torch.tensor(rows)
