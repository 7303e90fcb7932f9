"""The loss of every kind of task, row by row, so that each row of a mixed batch has its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from graftory.adapter import TaskKind
from graftory.training.encode import IGNORED


@dataclass(frozen=True, slots=True)
class RowLosses:
    """Losses of a batch: per row the sum over its targets and how many they are, both [rows]."""

    total: Tensor
    count: Tensor

    def mean(self) -> Tensor:
        """The mean over all targets of the batch, a scalar."""
        return self.total.sum() / self.count.sum().clamp(min=1)


def row_losses(kind: TaskKind, logits: Tensor, labels: Tensor) -> RowLosses:
    """The losses of a batch.

    Args:
        kind: Kind of task.
        logits: [rows, outputs], narrower heads padded with minus infinity; or [rows, length, vocabulary].
        labels: [rows]; or [rows, length] with -100 where nothing is to be predicted.
    """
    return _LOSSES[kind](logits, labels)


def mixed_losses(kinds: Sequence[TaskKind], logits: Tensor, labels: Tensor) -> RowLosses:
    """The losses of a batch whose rows are of several tasks.

    Args:
        kinds: Kind of task of each row, or one for all.
        logits: As in `row_losses`.
        labels: As in `row_losses`; where classes and numbers are mixed, all are floats.
    """
    if len(set(kinds)) == 1:
        return row_losses(kinds[0], logits, labels)
    total, count = logits.new_zeros(len(logits), dtype=torch.float32), labels.new_zeros(len(labels)).long()
    for kind in dict.fromkeys(kinds):
        rows = torch.tensor([number for number, other in enumerate(kinds) if other == kind], device=logits.device)
        own = labels[rows].long() if kind == "classification" else labels[rows]
        part = row_losses(kind, logits[rows], own)
        total, count = total.index_copy(0, rows, part.total), count.index_copy(0, rows, part.count)
    return RowLosses(total, count)


def _cross_entropy(logits: Tensor, labels: Tensor) -> RowLosses:
    """-log softmax(z)_y; an output at minus infinity has probability 0 and no gradient."""
    return RowLosses(functional.cross_entropy(logits.float(), labels, reduction="none"), labels.new_ones(len(labels)))


def _squared_error(logits: Tensor, labels: Tensor) -> RowLosses:
    """(z_0 - y)^2."""
    error = logits[:, 0].float() - labels.to(logits.device).float()
    return RowLosses(error**2, labels.new_ones(len(labels)).long())


def _tokens(logits: Tensor, labels: Tensor) -> RowLosses:
    """Cross-entropy of every target token, position by position."""
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return RowLosses(losses.view(labels.shape).sum(1), labels.ne(IGNORED).sum(1))


def _next_tokens(logits: Tensor, labels: Tensor) -> RowLosses:
    """The same, where the output at a position predicts the token after it."""
    return _tokens(logits[:, :-1], labels[:, 1:])


_LOSSES: Mapping[TaskKind, Callable[[Tensor, Tensor], RowLosses]] = {
    "classification": _cross_entropy,
    "regression": _squared_error,
    "causal_lm": _next_tokens,
    "seq2seq": _tokens,
}


def model_inputs(kind: TaskKind, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model is called with. Only a sequence-to-sequence model sees the labels: it makes its decoder's
    inputs from them."""
    return {name: value for name, value in batch.items() if name != "labels" or kind == "seq2seq"}


def readable_tokens(kind: TaskKind, batch: Mapping[str, Tensor]) -> Tensor | None:
    """The tokens by which a router may choose, [rows, length]: of a causal language model those that it is not to
    predict, else all (None)."""
    return batch["labels"].eq(IGNORED) if kind == "causal_lm" and "labels" in batch else None
