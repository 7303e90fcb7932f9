"""Prompt transfer: the nearest source by hand, and `hub train --init-from`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graftory import Adapter, Hub, LoraConfig
from graftory.adapter import Parent
from graftory.config import PromptConfig
from graftory.errors import BaseMismatchError, UnsupportedAdapterError
from graftory.settings import TrainSettings
from graftory.training.transfer import as_start, probe, similarities, task_embedding
from tests.adapter_samples import make
from tests.conftest import tiny_model
from tests.test_cli_train import TASK, as_json, assert_error, call, make_base
from tests.training_samples import tiny_base, tiny_rows, tiny_task


def prompt(rows: list[list[float]]) -> Adapter:
    """A prompt with given soft tokens."""
    made = make(tiny_model("bert"), PromptConfig(length=len(rows)), labels=2)
    key = next(iter(made.body_tensors()))
    wide = torch.zeros(1, len(rows), 32)
    wide[0, :, : len(rows[0])] = torch.tensor(rows)
    return replace(made, tensors={**made.tensors, key: wide})


def test_the_nearest_prompt_by_hand() -> None:
    """Means (1, 0), (0, 1), (1, 1) and (-1, 0): the cosines to (1, 0) are 0, √½ and -1; lengths may differ."""
    target = prompt([[2.0, 1.0], [0.0, -1.0]])
    torch.testing.assert_close(task_embedding(target)[:3], torch.tensor([1.0, 0.0, 0.0]).double())
    sources = {"up": prompt([[0.0, 1.0]]), "both": prompt([[3.0, 3.0], [0.0, 0.0]]), "back": prompt([[-2.0, 0.0]])}
    found = similarities(target, sources)
    assert [name for name, _ in found] == ["both", "up", "back"]
    assert [value for _, value in found] == pytest.approx([0.5**0.5, 0.0, -1.0])


def test_a_probe_learns_for_so_many_steps(tmp_path: Path) -> None:
    loaded = tiny_base("classification", tmp_path)
    task, rows, config = tiny_task("classification"), tiny_rows("classification"), PromptConfig(length=3)
    settings = TrainSettings(batch_size=8, learning_rate=0.05)
    one, two = (probe(loaded, task, rows, config, settings, steps=steps, name="it") for steps in (1, 4))
    assert one.spec.lineage.parameters["max_steps"] == 1
    assert not torch.equal(task_embedding(one), task_embedding(two))
    assert task_embedding(one).shape == (32,)


def test_what_is_no_prompt_of_this_base_is_refused() -> None:
    target, model = prompt([[1.0]]), tiny_model("bert")
    with pytest.raises(UnsupportedAdapterError, match="is no prompt"):
        similarities(target, {"lora": make(model, LoraConfig())})
    with pytest.raises(UnsupportedAdapterError, match="is no prompt"):
        as_start(make(model, LoraConfig()))
    key = next(iter(target.body_tensors()))
    narrow = replace(target, tensors={key: target.tensors[key][..., :7]})
    with pytest.raises(BaseMismatchError, match="7 wide, this base's are 32"):
        similarities(target, {"narrow": narrow})
    assert as_start(target).spec.task is None
    assert not as_start(target).head_tensors()


def test_by_the_command_line(tmp_path: Path) -> None:
    """The nearest of two prompts, one of which is what the probe itself becomes, starts the training."""
    hub, base = tmp_path / "hub", make_base(tmp_path / "base", seed=0)
    Hub.create(hub)
    common = ("train", TASK, "--base", base, "--batch-size", "8", "--learning-rate", "0.05", "--method", "prompt")
    short = (*common, "--max-steps", "3", "--length", "3")
    assert_error(call(hub, *short, "--init-from", "nearest"), "no prompt of")
    assert call(hub, *short, "--name", "same").exit_code == 0
    assert call(hub, *short, "--name", "other", "--seed", "7", "--start", "normal").exit_code == 0
    assert call(hub, "train", TASK, "--base", base, "--max-steps", "1", "--name", "low").exit_code == 0
    found = as_json(call(hub, *short, "--init-from", "nearest", "--probe-steps", "3", "--name", "target", "--json"))
    assert found["init_from"] == "same@1"
    assert found["similarities"]["same@1"] == pytest.approx(1.0, abs=1e-6)
    assert set(found["similarities"]) == {"same@1", "other@1"}
    record = Hub.open(hub).record("target")
    assert record.spec.lineage.parents == (Parent("same@1", Hub.open(hub).record("same@1").digest, "continued"),)
    assert record.spec.lineage.parameters["similarities"] == found["similarities"]
    result = call(hub, *short, "--init-from", "other@1", "--name", "named")
    assert result.exit_code == 0, result.output
    assert "from other@1" in result.output
    assert_error(call(hub, *short, "--init-from", "low"), "is no prompt")
    assert_error(call(hub, "train", TASK, "--base", base, "--init-from", "other"), "--method prompt")
    stranger = make_base(tmp_path / "stranger", seed=1)
    elsewhere = ("train", TASK, "--base", stranger, "--method", "prompt", "--max-steps", "1", "--init-from")
    assert_error(call(hub, *elsewhere, "other"), "give a prompt of")
