"""Passes over the rows of a task: squared gradients, second moments, and which rows are read together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from graftory.adapters import attach, new_adapter
from graftory.config import LoraConfig
from graftory.continual.passes import batches, second_moments, squared_gradients
from graftory.data import Rows, load_rows, load_task
from graftory.training import LoadedBase, load_base
from tests.continual_samples import make_place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def loaded(place: Path) -> LoadedBase:
    return load_base(str(place / "base"), "classification")


def test_the_fisher_information_of_a_bias_by_hand(place: Path, loaded: LoadedBase) -> None:
    """∂(−log p_y)/∂bias = p − onehot(y), so its square is known from the logits alone."""
    task = load_task(str(place / "colours.yaml"))
    rows = load_rows(task, "train", limit=10)
    fresh = new_adapter(loaded.model, LoraConfig(rank=2), task=rows.info(task), base=loaded.base)
    fisher = squared_gradients(loaded, fresh, task, rows, head=True)
    adapted = attach(loaded.model, {"a": fresh})
    expected = torch.zeros(2)
    for text, target in zip(rows.texts, rows.targets, strict=True):
        with torch.no_grad(), adapted.route("a"):
            p = adapted(**loaded.tokenizer(text, return_tensors="pt")).logits[0].softmax(0)
        expected += (p - nn.functional.one_hot(torch.tensor(target), 2)) ** 2 / 10
    adapted.detach()
    assert torch.allclose(fisher["classifier.bias"], expected, atol=1e-6)
    # B is zero, so the loss does not depend on A yet
    assert all(float(value.abs().max()) == 0 for key, value in fisher.items() if key.endswith("lora_A.weight"))


def test_second_moments_leave_padding_out(place: Path, loaded: LoadedBase) -> None:
    task = load_task(str(place / "colours.yaml"))
    rows = load_rows(task, "train", limit=6)
    fresh = new_adapter(loaded.model, LoraConfig(rank=2), task=rows.info(task), base=loaded.base)
    together, apart = (second_moments(loaded, fresh, task, rows, size) for size in (6, 1))
    for path, moment in together.items():
        assert torch.allclose(moment, apart[path], rtol=1e-4, atol=1e-4)


def test_rows_of_like_length_are_batched_together(place: Path, loaded: LoadedBase) -> None:
    task = load_task(str(place / "colours.yaml"))
    texts = tuple(" ".join(["red"] * words) for words in (1, 9, 2, 8))
    rows = Rows("train", texts, (0, 1, 0, 1), load_rows(task, "train").labels)
    padding = [
        [int((batch["attention_mask"] == 0).sum()) for batch in batches(loaded, task, rows, 2, alike=sort)]
        for sort in (False, True)
    ]
    assert padding == [[8, 6], [1, 1]]
