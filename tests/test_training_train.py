"""Training on tiny models: what learns, what stays, what is reproducible, what can be resumed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftory.adapter import Adapter, TaskKind
from graftory.adapters import AdaptedModel, attach, new_adapter
from graftory.config import AdapterConfig, BottleneckConfig, Ia3Config, LoraConfig
from graftory.errors import BaseMismatchError, ConfigError
from graftory.training import Hooks, StepContext, TrainSettings, train
from graftory.training.company import head_of
from graftory.training.encode import Collator, encode
from graftory.training.trainer import CHECKPOINT_FILE
from tests.training_samples import tiny_base, tiny_rows, tiny_task

KINDS: tuple[TaskKind, ...] = ("classification", "regression", "causal_lm", "seq2seq")
FAST = TrainSettings(epochs=4, learning_rate=1e-2, batch_size=8)


class Log(TrainerCallback):
    """Keeps what the trainer logs, and may stop it like a kill would."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.rows: list[dict[str, float]] = []
        self.stop_at = stop_at

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self.rows.append(dict(logs or {}))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.stop_at:
            raise KeyboardInterrupt


def equal(first: Adapter, second: Adapter) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        tensor.equal(second.tensors[key]) for key, tensor in first.tensors.items()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [LoraConfig(), BottleneckConfig(size=8)])
def test_the_loss_falls_and_the_base_stays(tmp_path: Path, kind: TaskKind, config: AdapterConfig) -> None:
    loaded, log = tiny_base(kind, tmp_path), Log()
    before = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    settings = replace(FAST, epochs=20)
    adapter = train(loaded, tiny_task(kind), tiny_rows(kind), config, settings, name="tiny", callbacks=[log])
    losses = [row["loss"] for row in log.rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    after = loaded.model.state_dict()
    assert all(weight.equal(after[name]) for name, weight in before.items())
    assert all(weight.requires_grad for weight in loaded.model.parameters())
    assert not loaded.model.training
    assert bool(adapter.head_tensors()) == (kind in ("classification", "regression"))


def test_lineage_says_how_to_make_it_again(tmp_path: Path) -> None:
    loaded, rows = tiny_base("classification", tmp_path), tiny_rows("classification")
    adapter = train(loaded, tiny_task("classification"), rows, LoraConfig(), replace(FAST, seed=3), name="tiny")
    lineage, task = adapter.spec.lineage, adapter.spec.task
    assert (lineage.process, lineage.seed, lineage.data_hash) == ("train", 3, rows.hash)
    assert lineage.parameters["learning_rate"] == 1e-2
    assert lineage.parameters["rows"] == 24
    assert set(lineage.libraries) == {"graftory", "torch", "transformers", "peft"}
    assert task is not None
    assert (task.name, task.labels, task.head) == ("tiny", rows.labels, ("classifier",))
    assert adapter.spec.base == loaded.base


def test_same_seed_same_adapter(tmp_path: Path) -> None:
    loaded, task, rows = tiny_base("classification", tmp_path), tiny_task("classification"), tiny_rows("classification")
    config = LoraConfig(dropout=0.2)
    first, second, other = (
        train(loaded, task, rows, config, replace(FAST, epochs=1, seed=seed), name=name)
        for seed, name in ((1, "a"), (1, "b"), (2, "a"))
    )
    assert equal(first, second)
    assert not equal(first, other)


def gradients(folder: Path, kind: TaskKind, settings: TrainSettings) -> dict[str, Tensor]:
    """The gradients that the optimizer sees in the first step."""
    seen: dict[str, Tensor] = {}

    def keep(adapted: AdaptedModel, step: int) -> None:
        assert step == 0
        seen.update({n: w.grad.clone() for n, w in adapted.named_parameters() if w.grad is not None})

    settings = replace(settings, max_steps=1, gradient_clip=1e9)
    hooks = Hooks(on_gradients=(keep,))
    loaded = tiny_base(kind, folder)
    train(loaded, tiny_task(kind), tiny_rows(kind, 8), LoraConfig(init_seed=1), settings, name="x", hooks=hooks)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_task_loss(tmp_path: Path, kind: TaskKind) -> None:
    seen = gradients(tmp_path, kind, TrainSettings(batch_size=8))
    loaded, task, rows = tiny_base(kind, tmp_path), tiny_task(kind), tiny_rows(kind, 8)
    info = rows.info(task)
    pairs = zip(rows.texts, rows.targets, strict=True)
    batch = Collator(loaded.tokenizer.pad_token_id)([encode(loaded.tokenizer, info, x, y) for x, y in pairs])
    adapted = attach(loaded.model, {"x": new_adapter(loaded.model, LoraConfig(init_seed=1), task=info)})
    adapted.train_only("x")
    with adapted.route("x"):
        if kind in ("causal_lm", "seq2seq"):
            loss = adapted(**batch).loss
        else:
            labels = batch.pop("labels")
            logits = adapted(**batch).logits
            if kind == "classification":
                loss = -logits.log_softmax(-1)[range(8), labels].mean()
            else:
                loss = ((logits[:, 0] - labels) ** 2).mean()
        loss.backward()
    expected = {name: weight.grad for name, weight in adapted.named_parameters() if weight.grad is not None}
    assert expected.keys() == seen.keys()
    for name, gradient in expected.items():
        assert torch.allclose(seen[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"batch_size": 4, "accumulation": 2}])
def test_saving_memory_changes_no_gradient(tmp_path: Path, change: dict[str, Any]) -> None:
    plain = gradients(tmp_path, "classification", TrainSettings(batch_size=8))
    saved = gradients(tmp_path, "classification", replace(TrainSettings(batch_size=8), **change))
    assert plain.keys() == saved.keys()
    for name, gradient in plain.items():
        assert torch.allclose(saved[name], gradient, rtol=1e-4, atol=1e-6), name


def test_checkpointing_is_off_again_afterwards(tmp_path: Path) -> None:
    loaded = tiny_base("classification", tmp_path)
    settings = replace(FAST, max_steps=1, gradient_checkpointing=True)
    train(loaded, tiny_task("classification"), tiny_rows("classification"), LoraConfig(), settings, name="tiny")
    assert not loaded.model.is_gradient_checkpointing


@pytest.mark.parametrize("stop_at", [5, 2])
def test_a_training_that_was_cut_off_goes_on_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    loaded, task, rows = (
        tiny_base("classification", tmp_path / "base"),
        tiny_task("classification"),
        tiny_rows("classification", 20),
    )
    settings, config = replace(FAST, save_steps=3), LoraConfig(dropout=0.2)
    whole = train(loaded, task, rows, config, settings, name="tiny")
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(loaded, task, rows, config, settings, name="tiny", output_dir=folder, callbacks=[Log(stop_at)])
    assert all(weight.requires_grad for weight in loaded.model.parameters())
    if stop_at > 3:
        saved = load_file(folder / "checkpoint-3" / CHECKPOINT_FILE)
        assert sum(tensor.numel() for tensor in saved.values()) == sum(t.numel() for t in whole.tensors.values())
        shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-4")
        (folder / "checkpoint-4" / "trainer_state.json").write_text("{")
    log = Log()
    assert equal(train(loaded, task, rows, config, settings, name="tiny", output_dir=folder, callbacks=[log]), whole)
    assert equal(train(loaded, task, rows, config, settings, name="tiny", output_dir=folder), whole)


def test_a_folder_serves_one_training(tmp_path: Path) -> None:
    loaded, task, rows = tiny_base("classification", tmp_path), tiny_task("classification"), tiny_rows("classification")
    settings = replace(FAST, max_steps=1)
    train(loaded, task, rows, LoraConfig(), settings, name="tiny", output_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="holds the checkpoints of another training; delete it"):
        train(loaded, task, rows, LoraConfig(rank=4), settings, name="tiny", output_dir=tmp_path / "run")


def test_loss_terms_are_added_and_logged(tmp_path: Path) -> None:
    loaded, task, rows = tiny_base("classification", tmp_path), tiny_task("classification"), tiny_rows("classification")
    steps: list[int] = []

    def size(context: StepContext) -> Mapping[str, Tensor]:
        steps.append(context.step)
        return {"size": 1e3 * torch.stack([weight.square().sum() for weight in context.model.trainable()]).sum()}

    def total(adapter: Adapter) -> float:
        return sum(float(tensor.square().sum()) for tensor in adapter.tensors.values())

    log, settings = Log(), replace(FAST, weight_decay=0.0)
    plain = train(loaded, task, rows, LoraConfig(), settings, name="tiny")
    small = train(
        loaded, task, rows, LoraConfig(), settings, name="tiny", hooks=Hooks(loss_terms=(size,)), callbacks=[log]
    )
    assert total(small) < 0.8 * total(plain)
    assert steps == list(range(12))
    row = next(row for row in log.rows if "loss_size" in row)
    assert row["loss"] == pytest.approx(row["loss_task"] + row["loss_size"], rel=1e-3)


def test_two_loss_terms_need_two_names(tmp_path: Path) -> None:
    loaded, task, rows = tiny_base("classification", tmp_path), tiny_task("classification"), tiny_rows("classification")
    hooks = Hooks(loss_terms=(lambda _: {"task": torch.zeros(())},))
    with pytest.raises(ConfigError, match="two loss terms are called 'task'"):
        train(loaded, task, rows, LoraConfig(), FAST, name="tiny", hooks=hooks)


def test_going_on_from_an_adapter(tmp_path: Path) -> None:
    loaded, task, rows = tiny_base("classification", tmp_path), tiny_task("classification"), tiny_rows("classification")
    frozen = replace(FAST, max_steps=1, learning_rate=1e-30)
    first = train(loaded, task, rows, LoraConfig(rank=4), FAST, name="tiny")
    same = train(loaded, task, rows, LoraConfig(), frozen, name="tiny", init=first)
    assert all(torch.allclose(tensor, first.tensors[key]) for key, tensor in same.tensors.items())
    assert same.spec.config == first.spec.config
    older = replace(first, spec=replace(first.spec, base=replace(first.spec.base, tokenizer_hash=None)))
    assert train(loaded, task, rows, LoraConfig(), frozen, name="tiny", init=older).spec.base == loaded.base
    other = train(loaded, task, tiny_rows("classification", labels=5), LoraConfig(), frozen, name="tiny", init=first)
    assert other.tensors["classifier.weight"].shape == (5, 32)
    assert all(torch.allclose(tensor, first.tensors[key]) for key, tensor in other.body_tensors().items())
    wrong = replace(first, spec=replace(first.spec, base=replace(loaded.base, weights_hash="sha256:" + "0" * 64)))
    with pytest.raises(BaseMismatchError, match="'tiny' was trained on"):
        train(loaded, task, rows, LoraConfig(), FAST, name="tiny", init=wrong)


def test_heads_have_a_rate_of_their_own(tmp_path: Path) -> None:
    loaded, task, rows = tiny_base("classification", tmp_path), tiny_task("classification"), tiny_rows("classification")
    still = replace(FAST, max_steps=2, weight_decay=0.0, learning_rate=1e-30)
    start, same = (train(loaded, task, rows, LoraConfig(rank=4), still, name="tiny", init=None) for _ in range(2))
    moved = train(loaded, task, rows, LoraConfig(rank=4), replace(still, head_learning_rate=1e-2), name="tiny")
    assert all(torch.equal(same.tensors[key], tensor) for key, tensor in start.tensors.items())
    far = {key for key, tensor in moved.tensors.items() if (tensor - start.tensors[key]).abs().max() > 1e-3}
    assert far == set(start.head_tensors())
    body = train(
        loaded,
        task,
        rows,
        LoraConfig(rank=4),
        replace(still, learning_rate=1e-2, head_learning_rate=1e-30),
        name="tiny",
    )
    assert all(torch.allclose(body.tensors[key], tensor) for key, tensor in start.head_tensors().items())
    assert any((body.tensors[key] - tensor).abs().max() > 1e-3 for key, tensor in start.body_tensors().items())


def test_no_head_no_rate_of_a_head(tmp_path: Path) -> None:
    loaded, task, rows = tiny_base("causal_lm", tmp_path), tiny_task("causal_lm"), tiny_rows("causal_lm")
    with pytest.raises(ConfigError, match=r"head_learning_rate: got 0\.01, but the task is answered in words"):
        train(loaded, task, rows, LoraConfig(), replace(FAST, head_learning_rate=0.01), name="tiny")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("head_learning_rate", 0.0),
        ("epochs", 0),
        ("max_steps", 0),
        ("warmup", 1.0),
        ("weight_decay", -0.1),
        ("batch_size", 0),
    ],
)
def test_impossible_settings(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{setting}: got {value}, wanted"):
        replace(TrainSettings(), **{setting: value})


def test_a_head_stands_alone_whatever_its_body_was(tmp_path: Path) -> None:
    loaded = tiny_base("classification", tmp_path)
    info = tiny_rows("classification").info(tiny_task("classification"))
    adapter = new_adapter(loaded.model, Ia3Config(targets=("all",)), task=info, base=loaded.base)
    head = head_of(adapter)  # (IA)^3 names targets twice
    assert dict(head.tensors) == dict(adapter.head_tensors())
    adapted = AdaptedModel(loaded.model, loaded.base)
    adapted.add("head", head)
    adapted.detach()
