"""Where a fresh head starts: at the best linear head on what the model says before anything has learnt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from graftory.adapter import Adapter
from graftory.adapters import attach
from graftory.config import AdapterConfig, BottleneckConfig, LoraConfig, PrefixConfig
from graftory.data import Rows
from graftory.errors import ConfigError, RouteError, ShapeError
from graftory.training import Hooks, LoadedBase, TrainSettings, load_base, train
from graftory.training.company import Company, OtherTask, head_of
from graftory.training.learning import train_in_company
from graftory.training.linear_probe import linear_probe
from tests.test_training_train import Log, equal
from tests.training_samples import save_base, tiny_base, tiny_rows, tiny_task

STILL = TrainSettings(max_steps=1, learning_rate=1e-30, weight_decay=0.0, batch_size=8, head_start="probe")
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def steepness(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """Largest slope of Σ -log softmax(W f + b)_y + s² ‖W‖² / 2C at W and b, by the largest at 0; the least over C."""
    scale = features.var(0, correction=0).mean().sqrt()
    found = []
    for strength in STRENGTHS:
        slopes = []
        for factor in (1.0, 0.0):
            own = (factor * weight.double() * scale).requires_grad_()
            offset = torch.zeros(len(weight), dtype=torch.float64) if bias is None else factor * bias.double()
            offset.requires_grad_(bias is not None)
            logits = features @ (own / scale).T + offset
            (functional.cross_entropy(logits, labels, reduction="sum") + own.square().sum() / 2 / strength).backward()
            slopes.append(max(float(each.grad.abs().max()) for each in (own, offset) if each.grad is not None))
        found.append(slopes[0] / slopes[1])
    return min(found)


@pytest.mark.parametrize("labels", [2, 4])
@pytest.mark.parametrize("intercept", [True, False])
def test_a_probe_of_labels_is_where_the_regularised_loss_is_flat(labels: int, intercept: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(120) % labels
    scale = torch.linspace(0.1, 10, 6, dtype=torch.float64)
    features = torch.randn(120, 6, dtype=torch.float64, generator=generator)
    features = (features + functional.one_hot(targets, 6)) * scale + intercept * 3
    probe = linear_probe("classification", features, targets, labels, intercept=intercept)
    assert probe is not None
    weight, bias = probe
    assert weight.shape == (labels, 6)
    assert bool(bias.any()) == intercept
    assert steepness(features, targets, weight, bias if intercept else None) < 5e-3


def test_a_label_that_no_row_has_is_never_the_likeliest() -> None:
    features = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for present in ([0, 2, 3], [1, 3]):
        targets = torch.tensor([present[int(value)] for value in (features[:, 0] > 0).long()])
        probe = linear_probe("classification", features, targets, 5, intercept=True)
        assert probe is not None
        weight, bias = probe
        everywhere = 10 * torch.randn(1000, 5, generator=torch.Generator().manual_seed(1))
        assert set((everywhere @ weight.T + bias).argmax(1).tolist()) <= set(present)


def test_one_label_tells_nothing_and_few_rows_are_enough() -> None:
    features = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert linear_probe("classification", features, torch.tensor([1, 1, 1]), 2, intercept=True) is None
    probe = linear_probe("classification", features, torch.tensor([0, 1, 0]), 2, intercept=True)
    assert probe is not None
    assert (features.float() @ probe[0].T + probe[1]).argmax(1).tolist() == [0, 1, 0]


@pytest.mark.parametrize("intercept", [True, False])
def test_a_probe_of_numbers_is_ridge_regression(intercept: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(80, 5, dtype=torch.float64, generator=generator) * torch.tensor([1, 5, 0.2, 3, 1.0])
    targets = features @ torch.tensor([1.0, -0.5, 2.0, 0.0, 0.3], dtype=torch.float64) + 4 * intercept
    targets = targets + 0.3 * torch.randn(80, dtype=torch.float64, generator=generator)
    probe = linear_probe("regression", features, targets, 1, intercept=intercept)
    assert probe is not None
    scale = features.var(0, correction=0).mean().sqrt()
    scaled = features / scale
    mean, middle = (scaled.mean(0), targets.mean()) if intercept else (torch.zeros(5), torch.tensor(0.0))
    rows, numbers = (scaled - mean).double(), (targets - middle).double()
    wanted = {}
    for alpha in [10.0**power for power in range(-3, 4)]:
        inverse = torch.linalg.inv(rows.T @ rows + alpha * torch.eye(5, dtype=torch.float64))
        weight = inverse @ rows.T @ numbers
        share = (rows @ inverse @ rows.T).diagonal() + (1 / 80 if intercept else 0)
        left_out = ((numbers - rows @ weight) / (1 - share)).square().mean()
        wanted[float(left_out)] = weight
    best = wanted[min(wanted)]
    assert torch.allclose(probe[0][0].double() * scale, best, rtol=1e-4, atol=1e-5)
    prediction = features.float() @ probe[0].T + probe[1]
    assert torch.allclose(prediction[:, 0].double(), rows @ best + middle, rtol=1e-4, atol=1e-4)


def bert_features(loaded: LoadedBase, texts: list[str]) -> Tensor:
    batch = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        pooled: Tensor = loaded.model.base_model(**batch).pooler_output
    return pooled.double()


def gpt2_features(loaded: LoadedBase, texts: list[str]) -> Tensor:
    rows = [loaded.tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    with torch.no_grad():
        return torch.cat([loaded.model.base_model(row).last_hidden_state[:, -1] for row in rows]).double()


def read_with(loaded: LoadedBase, adapter: Adapter, rows: Rows) -> Tensor:
    """What a BERT's head reads of rows with an adapter in it."""
    adapted = attach(loaded.model, {"own": adapter})
    adapted.eval()
    with adapted.route("own"):
        features = bert_features(loaded, texts_of(rows))
    adapted.detach()
    return features


def texts_of(rows: Rows) -> list[str]:
    return [str(text) for text in rows.texts]


def slope(features: Tensor, rows: Rows, made: Adapter) -> float:
    """How steep the loss is where a BERT's head is."""
    targets = torch.tensor([int(target) for target in rows.targets])
    return steepness(features, targets, made.tensors["classifier.weight"], made.tensors["classifier.bias"])


@pytest.mark.parametrize(
    ("family", "features_of", "bias"),
    [("bert", bert_features, "classifier.bias"), ("gpt2", gpt2_features, None)],
)
@pytest.mark.parametrize("config", [LoraConfig(rank=2), BottleneckConfig(size=4)])
def test_a_head_starts_at_the_probe_of_what_the_base_says(
    family: str,
    features_of: Callable[[LoadedBase, list[str]], Tensor],
    bias: str | None,
    config: AdapterConfig,
    tmp_path: Path,
) -> None:
    loaded = load_base(save_base(family, tmp_path), "classification")
    rows = tiny_rows("classification", 60)
    made = train(loaded, tiny_task("classification"), rows, config, STILL, name="tiny")
    head = made.head_tensors()
    weight = next(tensor for key, tensor in head.items() if key.endswith("weight"))
    own = None if bias is None else head[bias]
    assert len(head) == (1 if bias is None else 2)
    features = features_of(loaded, texts_of(rows))
    targets = torch.tensor([int(target) for target in rows.targets])
    assert steepness(features, targets, weight, own) < 5e-3
    random = train(loaded, tiny_task("classification"), rows, config, replace(STILL, head_start="random"), name="tiny")
    assert all(torch.equal(random.tensors[key], tensor) for key, tensor in made.body_tensors().items())
    assert made.spec.lineage.parameters["head_start"] == "probe"


def test_a_head_of_several_layers_starts_too(tmp_path: Path) -> None:
    """T5's has a dense layer before the last one, and reads the end token of its decoder."""
    loaded = load_base(save_base("t5", tmp_path), "classification")
    task, rows = tiny_task("classification"), tiny_rows("classification", 60)
    log, plain = Log(), Log()
    settings = replace(STILL, max_steps=8)
    probed = train(loaded, task, rows, LoraConfig(rank=2), settings, name="tiny", callbacks=[log])
    random = replace(settings, head_start="random")
    fresh = train(loaded, task, rows, LoraConfig(rank=2), random, name="tiny", callbacks=[plain])
    changed = {key for key, tensor in fresh.tensors.items() if not torch.allclose(probed.tensors[key], tensor)}
    assert changed == {"classification_head.out_proj.weight", "classification_head.out_proj.bias"}
    losses = [next(row["train_loss"] for row in each.rows if "train_loss" in row) for each in (log, plain)]
    assert losses[0] < 0.9 * losses[1]


def test_what_a_prefix_changes_is_in_the_features(tmp_path: Path) -> None:
    """A fresh prefix is no identity: the head has to fit what the model says with it."""
    loaded, task = tiny_base("classification", tmp_path), tiny_task("classification")
    rows = tiny_rows("classification", 60)
    made = train(loaded, task, rows, PrefixConfig(length=4), STILL, name="tiny")
    bare = bert_features(loaded, texts_of(rows))
    assert slope(read_with(loaded, made, rows), rows, made) < 5e-3 < slope(bare, rows, made)


def test_a_head_that_has_learnt_stays(tmp_path: Path) -> None:
    loaded, task, rows = tiny_base("classification", tmp_path), tiny_task("classification"), tiny_rows("classification")
    first = train(loaded, task, rows, LoraConfig(rank=2), replace(STILL, head_start="random"), name="tiny")
    again = train(loaded, task, rows, LoraConfig(), STILL, name="tiny", init=first)
    assert equal(again, first)
    fresh = train_in_company(loaded, task, rows, LoraConfig(), STILL, name="tiny", init=first, fresh_head=True).adapter
    assert not torch.equal(fresh.tensors["classifier.weight"], first.tensors["classifier.weight"])
    other = tiny_rows("classification", labels=5)
    anew = train(loaded, task, other, LoraConfig(), STILL, name="tiny", init=first)
    assert slope(bert_features(loaded, texts_of(other)), other, anew) < 5e-3


def test_fresh_heads_in_company_start_at_their_own_rows(tmp_path: Path) -> None:
    loaded, task, rows = tiny_base("classification", tmp_path), tiny_task("classification"), tiny_rows("classification")
    others = tiny_rows("classification", 60, labels=5)
    still = replace(STILL, head_start="random")
    head = head_of(train(loaded, task, others, LoraConfig(rank=2), still, name="other"))
    company = Company(heads={"other": head}, others=(OtherTask(task, others, "other"),))
    kept = train_in_company(loaded, task, rows, LoraConfig(rank=2), STILL, name="tiny", company=company)
    assert equal(kept.heads["other"], head)
    started = train_in_company(
        loaded, task, rows, LoraConfig(rank=2), STILL, name="tiny", company=replace(company, fresh=("other",))
    )
    for adapter, own in ((started.adapter, rows), (started.heads["other"], others)):
        assert slope(bert_features(loaded, texts_of(own)), own, adapter) < 5e-3


def test_the_route_of_the_training_is_the_features_route(tmp_path: Path) -> None:
    """A strategy whose steps run through a frozen adapter as well has features of both."""
    loaded, task, rows = tiny_base("classification", tmp_path), tiny_task("classification"), tiny_rows("classification")
    old = train(loaded, task, rows, LoraConfig(rank=2), TrainSettings(epochs=4, learning_rate=1e-2), name="old")
    hooks = Hooks(route=lambda adapted, name: adapted.route([{name: 1.0, "old": 1.0}], [name]))
    made = train_in_company(
        loaded, task, rows, LoraConfig(rank=2), STILL, name="tiny", hooks=hooks, company=Company(adapters={"old": old})
    ).adapter
    assert slope(read_with(loaded, old, rows), rows, made) < 5e-3


def test_numbers_start_at_ridge_regression(tmp_path: Path) -> None:
    loaded, task, rows = tiny_base("regression", tmp_path), tiny_task("regression"), tiny_rows("regression", 60)
    made = train(loaded, task, rows, LoraConfig(rank=2), STILL, name="tiny")
    features = bert_features(loaded, texts_of(rows))
    targets = torch.tensor([float(target) for target in rows.targets])
    wanted = linear_probe("regression", features, targets, 1, intercept=True)
    assert wanted is not None
    assert torch.allclose(made.tensors["classifier.weight"], wanted[0], atol=1e-3)
    assert torch.allclose(made.tensors["classifier.bias"], wanted[1], atol=1e-3)


def test_a_training_that_was_cut_off_does_not_start_its_head_again(tmp_path: Path) -> None:
    loaded, task = tiny_base("classification", tmp_path / "base"), tiny_task("classification")
    rows = tiny_rows("classification", 20)
    settings = TrainSettings(epochs=4, learning_rate=1e-2, batch_size=8, save_steps=3, head_start="probe")
    whole = train(loaded, task, rows, LoraConfig(), settings, name="tiny")
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(loaded, task, rows, LoraConfig(), settings, name="tiny", output_dir=folder, callbacks=[Log(5)])
    assert equal(train(loaded, task, rows, LoraConfig(), settings, name="tiny", output_dir=folder), whole)


def test_no_head_no_start_of_a_head(tmp_path: Path) -> None:
    loaded, task, rows = tiny_base("causal_lm", tmp_path), tiny_task("causal_lm"), tiny_rows("causal_lm")
    with pytest.raises(ConfigError, match="head_start: got probe, but the task is answered in words and has no head"):
        train(loaded, task, rows, LoraConfig(), STILL, name="tiny")


def test_replacing_a_head(tmp_path: Path) -> None:
    loaded, task, rows = tiny_base("classification", tmp_path), tiny_task("classification"), tiny_rows("classification")
    made = train(loaded, task, rows, LoraConfig(rank=2), replace(STILL, head_start="random"), name="tiny")
    adapted = attach(loaded.model, {"tiny": made})
    adapted.train_only("tiny")
    wider = {"classifier.weight": torch.ones(7, 32), "classifier.bias": torch.zeros(7)}
    adapted.replace_head("tiny", wider)
    assert sum(weight.numel() for weight in adapted.trainable()) == sum(
        tensor.numel() for tensor in (*made.body_tensors().values(), *wider.values())
    )
    batch = loaded.tokenizer(["w1 w2"], return_tensors="pt")
    with torch.no_grad(), adapted.route("tiny"):
        assert adapted(**batch).logits.shape == (1, 7)
    with pytest.raises(ShapeError, match=r"classifier\.weight: got nothing"):
        adapted.replace_head("tiny", {})
    assert torch.equal(adapted.extract("tiny").tensors["classifier.weight"], torch.ones(7, 32))
    adapted.add("body", Adapter(replace(made.spec, task=None), made.body_tensors()))
    with pytest.raises(RouteError, match="'body' has no head"):
        adapted.replace_head("body", wider)
    adapted.detach()
