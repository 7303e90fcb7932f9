"""PHA: its contrastive losses by hand, what is the same as a hyperformer, the nearest prototype, what is exported."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from graftory import Adapter, Hub, attach
from graftory.compose import export
from graftory.compose.hyperformer import add_task, generate, hyperformer, task_adapter
from graftory.compose.hyperformer.retriever import (
    Contrast,
    instance_loss,
    prototype_loss,
    prototypes,
    retrieved,
    similarities,
    task_features,
)
from graftory.config import HyperformerConfig, HyperTask, PhaConfig
from graftory.data import Rows, TaskFile
from graftory.errors import ConfigError, MergeError, UnsupportedAdapterError
from graftory.settings import HyperformerSettings
from graftory.training import LoadedBase
from tests.adapter_samples import logits, shaken
from tests.conftest import tiny_batch
from tests.training_samples import tiny_base, tiny_task

SMALL = PhaConfig(size=5, embedding=6, hidden=7, retriever=9, contrast=1.0, contrast_rows=8)
QUICK = HyperformerSettings(
    max_steps=20, batch_size=8, warmup=0.0, learning_rate=2e-2, embedding_learning_rate=2e-2, head_learning_rate=2e-2
)
STILL = replace(QUICK, max_steps=1, learning_rate=1e-12, embedding_learning_rate=1e-12, head_learning_rate=1e-12)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return tiny_base("classification", tmp_path_factory.mktemp("base"))


def a_task(name: str, first: int, rows: int = 24) -> tuple[TaskFile, Rows]:
    """A task whose words are ten of the forty."""
    texts = tuple(f"w{first + row % 9} w{first + (3 * row) % 10} w{first + row % 7}" for row in range(rows))
    labels = ("no", "yes")
    return replace(tiny_task("classification"), name=name), Rows(
        "train", texts, tuple(r % 2 for r in range(rows)), labels
    )


def two_tasks() -> list[tuple[TaskFile, Rows]]:
    return [a_task("one", 0), a_task("two", 20)]


@pytest.fixture(scope="module")
def trained(loaded: LoadedBase) -> Adapter:
    return hyperformer(loaded, two_tasks(), SMALL, QUICK)


def config_of(adapter: Adapter) -> PhaConfig:
    config = adapter.spec.config
    assert isinstance(config, PhaConfig)
    return config


def test_the_contrastive_losses_by_hand() -> None:
    """Rows (1, 0), (0, 3), (2, 0) of the tasks 0, 1, 0, T = 1/2: cosines 0 and 1, scores 0 and 2."""
    queries, tasks = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 0.0]]), torch.tensor([0, 1, 0])
    # rows 0 and 2 have each other, and row 1 against them; row 1 is alone
    assert float(instance_loss(queries, tasks, 0.5)) == pytest.approx(math.log(1 + math.exp(-2)))
    # k = (0, 5), (4, 0): each row is at the other task's prototype, e⁰ / (e⁰ + e²)
    known = torch.tensor([[0.0, 5.0], [4.0, 0.0]])
    assert float(prototype_loss(queries, tasks, known, 0.5)) == pytest.approx(math.log(1 + math.exp(2)))
    assert float(instance_loss(queries[:2], tasks[:2], 0.5)) == 0


def test_their_gradients_are_the_slopes() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    known = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    tasks = torch.tensor([0, 1, 0, 2, 1])
    assert torch.autograd.gradcheck(lambda q: instance_loss(q, tasks, 0.3), (queries,))
    assert torch.autograd.gradcheck(lambda q, k: prototype_loss(q, tasks, k, 0.3), (queries, known))


def test_the_retriever_is_the_formula(trained: Adapter) -> None:
    t = {name: value.double() for name, value in trained.tensors.items() if name.startswith("retriever.")}
    features = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    for row, found in zip(features.double(), retrieved(trained.tensors, features), strict=True):
        hidden = (t["retriever.project_in.weight"] @ row + t["retriever.project_in.bias"]).clamp(min=0)
        wanted = t["retriever.project_out.weight"] @ hidden + t["retriever.project_out.bias"]
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


def test_without_the_contrast_it_is_a_hyperformer_bit_for_bit(loaded: LoadedBase) -> None:
    short = replace(QUICK, max_steps=2)
    plain = HyperformerConfig(size=5, embedding=6, hidden=7)
    same = hyperformer(loaded, two_tasks(), plain, short)
    none = hyperformer(loaded, two_tasks(), replace(SMALL, contrast=0.0), short)
    other = hyperformer(loaded, two_tasks(), SMALL, short)
    assert all(torch.equal(none.tensors[name], value) for name, value in same.tensors.items())
    more = none.tensors.keys() - same.tensors.keys()
    assert {name.partition(".")[0] for name in more} == {"retriever"}
    assert all(not torch.equal(other.tensors[name], none.tensors[name]) for name in more)
    assert not torch.equal(other.tensors["tasks.0.embedding"], none.tensors["tasks.0.embedding"])


def test_a_step_draws_rows_of_every_task() -> None:
    features = tuple(torch.full((3, 2), float(number)) + torch.rand(3, 2) / 2 for number in range(2))
    tasks = tuple(HyperTask(name=f"task{number}", kind="classification") for number in range(5))
    term = Contrast(replace(SMALL, contrast_rows=4, tasks=tasks), features, seed=0)
    drawn, numbers = term.drawn(7)
    assert numbers.tolist() == [3] * 4 + [4] * 4, "the last tasks are those that learn"
    assert drawn.int()[:, 0].tolist() == [0] * 4 + [1] * 4
    assert torch.equal(term.drawn(7)[0], drawn)
    assert not torch.equal(term.drawn(8)[0], drawn)


def test_rows_are_nearest_to_their_own_prototype(loaded: LoadedBase, trained: Adapter) -> None:
    for number, (_, rows) in enumerate(two_tasks()):
        features = task_features(loaded, rows, 0)
        found = similarities(config_of(trained), trained.tensors, features)
        assert found.index(max(found)) == number
        unit = torch.nn.functional.normalize(retrieved(trained.tensors, features).double(), dim=-1)
        known = torch.nn.functional.normalize(prototypes(config_of(trained), trained.tensors).double(), dim=-1)
        assert found == pytest.approx((unit @ known.T).mean(0).tolist(), abs=1e-5)


def test_a_task_more_starts_from_the_nearest_prototype(loaded: LoadedBase, trained: Adapter) -> None:
    for first, nearest in ((0, 0), (20, 1)):
        task, rows = a_task("three", first, rows=6)
        start = add_task(loaded, trained, task, rows, STILL)
        torch.testing.assert_close(
            start.tensors["tasks.2.embedding"], trained.tensors[f"tasks.{nearest}.embedding"], atol=1e-6, rtol=1e-6
        )
        assert start.spec.lineage.parameters["nearest"] == ("one", "two")[nearest]
    grown = add_task(loaded, trained, task, rows, replace(QUICK, max_steps=5))
    assert all(torch.equal(grown.tensors[name], value) for name, value in trained.tensors.items())
    more = set(grown.tensors) - set(trained.tensors)
    assert more == {"tasks.2.embedding", "tasks.2.head.classifier.weight", "tasks.2.head.classifier.bias"}
    assert not torch.equal(grown.tensors["tasks.2.embedding"], start.tensors["tasks.2.embedding"])


def test_what_is_exported_of_a_task_is_the_live_model(loaded: LoadedBase, trained: Adapter, tmp_path: Any) -> None:
    hub = Hub.create(tmp_path / "hub")
    hub.put("many", shaken(trained))
    hyper = hub.get("many")
    assert hyper.spec == trained.spec
    model, batch = loaded.model, {key: value % 44 for key, value in tiny_batch("bert").items()}
    adapted = attach(model, {name: task_adapter(hyper, name) for name in ("one", "two")})

    def asked(name: str) -> Tensor:
        with torch.no_grad(), adapted.route(name, heads="one"):
            return logits(adapted, batch)

    exported = asked("two")
    assert (exported - asked("one")).abs().max() > 1e-4
    with adapted.made("one", generate(config_of(hyper), hyper.tensors, 1)):
        torch.testing.assert_close(asked("one"), exported, atol=1e-5, rtol=1e-5)
    adapted.detach()
    plain = task_adapter(hyper, "two")
    assert plain.spec.method == "normed_bottleneck"
    assert not any("retriever" in name for name in plain.tensors)


def test_what_is_refused(loaded: LoadedBase, trained: Adapter) -> None:
    for fields in (
        {"contrast": -1.0},
        {"contrast_temperature": 0.0},
        {"contrast_rows": 0},
        {"retriever": 0},
        {"width": -1},
    ):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            PhaConfig(**fields)
    with pytest.raises(UnsupportedAdapterError, match="hub compose export-task"):
        attach(loaded.model, {"x": trained})
    with pytest.raises(MergeError, match="hub compose export-task"):
        export(loaded.model, trained)
    with pytest.raises(ConfigError, match="each may be there once"):
        add_task(loaded, trained, *a_task("one", 0))
