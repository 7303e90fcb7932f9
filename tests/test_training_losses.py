"""Losses row by row, against closed forms and the losses that transformers' own models compute."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from graftory.adapter import TaskKind
from graftory.training import row_losses
from graftory.training.encode import Collator, encode
from graftory.training.losses import model_inputs
from tests.training_samples import tiny_base, tiny_rows, tiny_task


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    losses = row_losses("classification", logits, torch.tensor([1, 0]))
    assert losses.total.tolist() == pytest.approx([math.log(2), math.log(4 / 3)])
    assert float(losses.mean()) == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)


def test_padding_with_minus_infinity_changes_neither_loss_nor_gradient() -> None:
    narrow = torch.tensor([[0.3, -1.2]], requires_grad=True)
    wide = torch.tensor([[0.3, -1.2]], requires_grad=True)
    padded = torch.nn.functional.pad(wide, (0, 3), value=float("-inf"))
    label = torch.tensor([1])
    first, second = row_losses("classification", narrow, label), row_losses("classification", padded, label)
    first.total.sum().backward()
    second.total.sum().backward()
    assert second.total.equal(first.total)
    assert narrow.grad is not None
    assert wide.grad is not None
    assert torch.allclose(wide.grad, narrow.grad)


def test_squared_error_uses_the_first_output() -> None:
    logits = torch.tensor([[1.0, float("-inf")], [2.0, float("-inf")]])
    losses = row_losses("regression", logits, torch.tensor([0.5, 4.0]))
    assert losses.total.tolist() == [0.25, 4.0]


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq"])
def test_language_models_agree_with_transformers_own_loss(tmp_path: Path, kind: TaskKind) -> None:
    loaded, task, rows = tiny_base(kind, tmp_path), tiny_task(kind), tiny_rows(kind, 6)
    pairs = zip(rows.texts, rows.targets, strict=True)
    examples = [encode(loaded.tokenizer, rows.info(task), text, target) for text, target in pairs]
    batch = Collator(loaded.tokenizer.pad_token_id)(examples)
    with torch.no_grad():
        expected = loaded.model(**batch).loss
        losses = row_losses(kind, loaded.model(**model_inputs(kind, batch)).logits, batch["labels"])
    assert losses.count.tolist() == [3] * 6
    assert float(losses.mean()) == pytest.approx(float(expected), rel=1e-5)
