"""What counts as unchanged since the step before: the last bit of a tensor, the configuration, the way of each row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from graftory.adapter import Adapter
from graftory.config import LoraConfig
from graftory.continual.readout import Readout
from graftory.continual.state import Cell
from graftory.continual.strategies import Answer
from graftory.continual.unchanged import mark, routed_mark, unchanged
from graftory.training.mixture import Mixture
from tests.hub_samples import lora


def nudged(adapter: Adapter, name: str) -> Adapter:
    """The next float in one place."""
    tensors = {key: tensor.clone() for key, tensor in adapter.tensors.items()}
    flat = tensors[name].view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
    return Adapter(adapter.spec, tensors)


def test_the_same_tensors_have_the_same_mark() -> None:
    assert mark(Answer(lora(), lora())) == mark(Answer(lora(), lora()))


def test_one_bit_of_body_or_head_makes_another_mark() -> None:
    adapter = lora()
    body = next(name for name in adapter.tensors if "lora_A" in name)
    answers = [
        Answer(adapter, adapter),
        Answer(nudged(adapter, body), adapter),
        Answer(adapter, nudged(adapter, "classifier.bias")),
        Answer(None, adapter),
        Answer(adapter, None),
        Answer(None, None),
    ]
    assert len({mark(answer) for answer in answers}) == len(answers)


def test_the_scale_and_the_labels_are_part_of_it() -> None:
    adapter = lora()
    config, task = adapter.spec.config, adapter.spec.task
    assert isinstance(config, LoraConfig)
    assert task is not None
    louder = Adapter(replace(adapter.spec, config=replace(config, alpha=99.0)), adapter.tensors)
    swapped = Adapter(replace(adapter.spec, task=replace(task, labels=("b", "a", "c"))), adapter.tensors)
    assert mark(Answer(louder, adapter)) != mark(Answer(adapter, adapter))
    assert mark(Answer(adapter, swapped)) != mark(Answer(adapter, adapter))


def test_a_head_is_no_part_of_a_body() -> None:
    adapter = lora()
    assert mark(Answer(adapter, adapter)) == mark(Answer(nudged(adapter, "classifier.bias"), adapter))


def test_mixtures_and_readouts_are_always_measured() -> None:
    def weigh(*given: object) -> torch.Tensor:
        raise AssertionError

    adapter, readout = lora(), Readout(-1, None, torch.ones(3, 2), (0, 1))
    assert mark(Answer(None, adapter, Mixture((adapter,), weigh))) == ""
    assert mark(Answer(None, None, readout=readout)) == ""
    assert routed_mark(["a", "b"], {"a": "x", "b": ""}) == ""


def test_a_row_that_goes_elsewhere_makes_another_mark() -> None:
    marks = {"a": "x", "b": "y"}
    first = routed_mark(["a", "b", "a"], marks)
    assert first == routed_mark(["a", "b", "a"], {**marks, "c": "z"})
    assert first != routed_mark(["b", "a", "a"], marks)  # as many to each, others
    assert first != routed_mark(["a", "b", "a"], {**marks, "b": "z"})


@pytest.mark.parametrize(
    ("before", "own"), [(None, "x"), ("y", "x"), ("", "")], ids=["nothing there", "another", "cannot be told"]
)
def test_what_is_measured(before: str | None, own: str) -> None:
    cell = None if before is None else Cell(1, 0, "oracle", "accuracy", 0.5, 4, mark=before)
    assert unchanged(cell, own, 2) is None


def test_what_is_taken_over() -> None:
    cell = Cell(1, 0, "routed", "accuracy", 0.5, 4, {"a": 4}, mark="x")
    assert unchanged(cell, "x", 2) == Cell(2, 0, "routed", "accuracy", 0.5, 4, {"a": 4}, copied=True, mark="x")
