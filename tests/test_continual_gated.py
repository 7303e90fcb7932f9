"""Attention over keys of tasks: by hand, at its extremes, and in a run."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.adapters import attach, new_adapter
from graftory.config import AdapterConfig, BottleneckConfig, LoraConfig
from graftory.continual.attention import PARTS, TaskAttention, fresh_network
from graftory.continual.freeze import frozen_hashes
from graftory.continual.state import RunFolder
from graftory.continual.strategies import Kept
from graftory.continual.strategies.gated import divergence, pseudo_samples
from graftory.data import load_rows, load_task
from graftory.training import LoadedBase, load_base
from graftory.training.mixture import Mixture, embedded
from graftory.training.prediction import Query, score
from tests.continual_samples import SHORT, make_place, short_run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def loaded(place: Path) -> LoadedBase:
    return load_base(str(place / "base"), "classification")


def test_attention_by_hand() -> None:
    """W₂ W₁ e = (2, 0), which the layer norm takes to (1, −1); scores (√2 ln 3) / √2 and 0: weights 3/4 and 1/4."""
    network = {
        "down.weight": torch.tensor([[1.0, 0.0]]),
        "up.weight": torch.tensor([[2.0], [0.0]]),
        "norm.weight": torch.ones(2),
        "norm.bias": torch.zeros(2),
    }
    keys = torch.tensor([[math.sqrt(2) * math.log(3), 0.0], [0.0, 0.0]])
    for learns in (False, True):
        attention = TaskAttention(network, keys, 1.0, learns=learns)
        weights = attention.weigh(torch.tensor([[1.0, 5.0]])).detach()
        assert weights[0].tolist() == pytest.approx([0.75, 0.25], abs=1e-5)
        assert attention.network().keys() == set(PARTS)
    softer = TaskAttention(network, keys, 2.0, learns=False).weigh(torch.tensor([[1.0, 5.0]])).detach()
    assert float(softer[0, 0] / softer[0, 1]) == pytest.approx(math.sqrt(3), rel=1e-4)


def test_features_are_the_largest_values_of_the_embeddings(loaded: LoadedBase) -> None:
    batch = loaded.tokenizer(["red paint", "owl zoo river crow"], padding=True, return_tensors="pt")
    found = embedded(loaded.model, "classification", batch)
    table = loaded.model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    for row, text in zip(found, ("red paint", "owl zoo river crow"), strict=True):
        assert torch.equal(row, table[loaded.tokenizer(text)["input_ids"]].amax(0))
    labels = batch["input_ids"].clone()
    labels[:, :2] = -100  # of a language model, what it is to predict does not count
    found = embedded(loaded.model, "causal_lm", {**batch, "labels": labels})
    assert torch.equal(found[1], table[batch["input_ids"][1, :2]].amax(0))


def two(loaded: LoadedBase, config: AdapterConfig) -> tuple[Adapter, Adapter]:
    made = []
    for seed in (1, 2):
        fresh = new_adapter(loaded.model, replace(config, init_seed=seed), base=loaded.base)
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: torch.randn(value.shape, generator=generator) / 4 for key, value in fresh.tensors.items()}
        made.append(Adapter(fresh.spec, tensors))
    return made[0], made[1]


@pytest.mark.parametrize("config", [LoraConfig(rank=3), BottleneckConfig(size=4)], ids=["lora", "bottleneck"])
def test_keys_far_apart_make_every_row_use_one_adapter(place: Path, loaded: LoadedBase, config: AdapterConfig) -> None:
    task = load_task(str(place / "colours.yaml"))
    head = new_adapter(loaded.model, config, task=load_rows(task, "test", limit=4).info(task), base=loaded.base)
    adapters, texts = two(loaded, config), ("red", "owl")
    network = fresh_network(32, 8, 0)
    probe = TaskAttention(network, torch.zeros(1, 32), 1.0, learns=False)
    features = embedded(loaded.model, "classification", loaded.tokenizer(list(texts), return_tensors="pt"))
    queries = probe.norm(torch.nn.functional.silu(probe.up(probe.down(features)))).detach()
    apart = 1e4 * (queries[0] - queries[1])
    far = TaskAttention(network, torch.stack([apart, -apart]), 1.0, learns=False)
    assert far.weigh(features).detach().tolist() == [[1.0, 0.0], [0.0, 1.0]]
    mixture = Mixture(adapters, far.weigh)
    rows = [*texts, "red"]
    asked = [Query(text, None, head, mixture=mixture) for text in rows]
    alone = [Query(text, adapters[0] if text == "red" else adapters[1], head) for text in rows]
    found, expected = (score(loaded, queries_) for queries_ in (asked, alone))
    for one, other in zip(found, expected, strict=True):
        assert one.logits is not None
        assert other.logits is not None
        assert float((one.logits - other.logits).abs().max()) <= 1e-6
    [other] = score(loaded, [Query("red", adapters[1], head)])
    assert found[0].logits is not None
    assert other.logits is not None
    assert not torch.allclose(found[0].logits, other.logits, atol=1e-3)


def test_equal_keys_mix_all_adapters_alike(place: Path, loaded: LoadedBase) -> None:
    config = LoraConfig(rank=3)
    first, second = two(loaded, config)
    task = load_task(str(place / "colours.yaml"))
    head = new_adapter(loaded.model, config, task=load_rows(task, "test", limit=4).info(task), base=loaded.base)
    even = TaskAttention(fresh_network(32, 8, 0), torch.ones(2, 32), 1.0, learns=False)
    [found] = score(loaded, [Query("red wall", None, head, mixture=Mixture((first, second), even.weigh))])
    adapted = attach(loaded.model, {"a": first, "b": second, "head": head})
    with torch.no_grad(), adapted.route([{"a": 0.5, "b": 0.5}], ["head"]):
        expected = adapted(**loaded.tokenizer("red wall", return_tensors="pt")).logits[0, :2]
    adapted.detach()
    assert found.logits is not None
    assert torch.allclose(found.logits, expected, atol=1e-6)


def test_what_reflection_holds_by_hand() -> None:
    old, new = (
        torch.tensor([[0.5, 0.5], [1.0, 1e-30]]).log(),
        torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25]]).log(),
    )
    assert float(divergence(old, new)) == pytest.approx((math.log(2) + math.log(2)) / 2)
    tensors = {"mean": torch.tensor([[1.0, -1.0], [5.0, 5.0]]), "deviation": torch.tensor([[0.5, 2.0], [0.0, 0.0]])}
    drawn = pseudo_samples(Kept(tensors).moved("gate"), 4000, 3)
    first = drawn[drawn[:, 0] != 5.0]
    assert 1850 < len(first) < 2150
    assert first.mean(0).tolist() == pytest.approx([1.0, -1.0], abs=0.15)
    assert first.std(0).tolist() == pytest.approx([0.5, 2.0], rel=0.07)


def test_rows_find_their_adapters_and_what_is_old_stays(place: Path, loaded: LoadedBase, tmp_path: Path) -> None:
    """The tasks share no word. Old adapters and keys are the same bits after the second task."""
    long = {**SHORT, "max_steps": 48}
    report, (first, second), folder = short_run(place, tmp_path, "gated", ["colours", "animals"], train=long)
    assert min(report.matrix[1]) > 0.8
    assert report.routing is None
    [ref, _] = [result.ref for result in report.results]
    assert (ref, second.spec.lineage.parents[0].ref) == ("run-colours@1", "run-colours@1")
    hashes = sorted(frozen_hashes(loaded.model, {ref: first.tensors}).items())
    assert folder.commits()[1].frozen == f"sha256:{hashlib.sha256(repr(hashes).encode()).hexdigest()}"
    kept = [kept_of(folder, number) for number in (0, 1)]
    assert torch.equal(kept[1]["keys"][0], kept[0]["keys"][0])
    assert kept[1]["keys"].shape == (2, 32)
    assert not torch.equal(kept[1]["up.weight"], kept[0]["up.weight"])
    attention = TaskAttention({part: kept[1][part] for part in PARTS}, kept[1]["keys"], 1.0, learns=False)
    for number, name in enumerate(("colours", "animals")):
        texts = load_rows(load_task(str(place / f"{name}.yaml")), "test", limit=30, seed=3).texts
        batch = loaded.tokenizer(list(texts), padding=True, return_tensors="pt")
        weights = attention.weigh(embedded(loaded.model, "classification", batch)).detach().mean(0)
        assert int(weights.argmax()) == number
    assert set(report.storage[1]) == {"adapters", "gate", "heads"}
    assert report.storage[1]["adapters"] == 2 * report.storage[0]["adapters"]


def kept_of(folder: RunFolder, number: int) -> dict[str, torch.Tensor]:
    return dict(folder.kept(folder.commits()[number]).under("gate").tensors)
