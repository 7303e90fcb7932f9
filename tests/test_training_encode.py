"""Rows to tokens and labels, against ids written out by hand (w0 has id 4)."""

from __future__ import annotations

import pytest
import torch

from graftory.adapter import TaskInfo
from graftory.errors import ConfigError
from graftory.training.encode import Collator, encode
from tests.training_samples import tokenizer_of


def test_classification_and_pairs() -> None:
    tokenizer, task = tokenizer_of("bert"), TaskInfo("t", "classification", ("a", "b"), max_length=6)
    assert encode(tokenizer, task, "w0 w1", 1) == {
        "input_ids": [1, 4, 5, 2],
        "attention_mask": [1, 1, 1, 1],
        "token_type_ids": [0, 0, 0, 0],
        "labels": 1,
    }
    pair = encode(tokenizer, task, ("w0 w1", "w2 w3 w4"))
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1] or pair["token_type_ids"] == [0, 0, 0, 1, 1, 1]
    assert len(pair["input_ids"]) == 6
    assert "labels" not in pair


def test_causal_labels_are_the_target_and_the_end_only() -> None:
    task = TaskInfo("t", "causal_lm", max_length=8, template="w9 {text} w10")
    row = encode(tokenizer_of("gpt2"), task, "w0 w1", "w2 w3")
    assert row["input_ids"] == [13, 4, 5, 14, 6, 7, 2]
    assert row["labels"] == [-100, -100, -100, -100, 6, 7, 2]
    assert encode(tokenizer_of("gpt2"), task, "w0 w1")["input_ids"] == [13, 4, 5, 14]


def test_a_long_causal_row_loses_the_beginning_of_its_prompt_then_the_end_of_its_target() -> None:
    tokenizer = tokenizer_of("gpt2")
    row = encode(tokenizer, TaskInfo("t", "causal_lm", max_length=4), "w0 w1 w2 w3", "w8")
    assert row["input_ids"] == [6, 7, 12, 2]
    assert row["labels"] == [-100, -100, 12, 2]
    row = encode(tokenizer, TaskInfo("t", "causal_lm", max_length=3), "w0 w1 w2", "w5 w6 w7")
    assert row["input_ids"] == [6, 9, 10]
    assert row["labels"] == [-100, 9, 10]


def test_seq2seq() -> None:
    task = TaskInfo("t", "seq2seq", max_length=4, template="{pair} {text}")
    row = encode(tokenizer_of("t5"), task, ("w0", "w1 w2"), "w3 w4 w5 w6")
    assert row == {"input_ids": [5, 6, 4, 2], "attention_mask": [1, 1, 1, 1], "labels": [7, 8, 9, 2]}


@pytest.mark.parametrize(("side", "ids"), [("right", [[1, 2, 3], [4, 0, 0]]), ("left", [[1, 2, 3], [0, 0, 4]])])
def test_collator_pads_each_part_with_its_own_value(side: str, ids: list[list[int]]) -> None:
    rows = [
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [7, 8]},
        {"input_ids": [4], "attention_mask": [1], "labels": [9]},
    ]
    batch = Collator(0, "left" if side == "left" else "right")(rows)
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [int(value > 0) for value in ids[1]]]
    assert batch["labels"].tolist() == [[7, 8], [9, -100] if side == "right" else [-100, 9]]


def test_collator_makes_one_number_a_row_a_vector() -> None:
    rows = [{"input_ids": [1], "labels": 0.5}, {"input_ids": [2], "labels": 2.0}]
    batch = Collator(0)(rows)
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [0.5, 2.0]
    with pytest.raises(ConfigError, match="do not go in one batch"):
        Collator(0)([rows[0], {"input_ids": [1]}])
