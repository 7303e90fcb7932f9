"""The ridge head against scikit-learn's Ridge on all rows at once, and RanPAC on made-up tasks against plain numpy."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from graftory.continual.ridge import (
    STRENGTHS,
    Moments,
    choose_strength,
    held_out_errors,
    projected,
    random_projection,
    solve,
)
from graftory.continual.strategies import strategy_of
from graftory.data import Rows, load_rows, load_task
from graftory.errors import ConfigError, ShapeError
from graftory.training import load_base
from tests.continual_samples import make_place, short_run, write_task

Batch = tuple[Tensor, Tensor]


def batches(count: int = 3, width: int = 12) -> list[Batch]:
    """Tasks of two classes each, on correlated features far from 0."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    found = []
    for task in range(count):
        classes = torch.randint(2 * task, 2 * task + 2, (50 + 10 * task,), generator=generator)
        noise = torch.randn(len(classes), width, generator=generator, dtype=torch.float64) @ mix
        found.append((noise + 3 + classes[:, None] * mix[classes % width], classes))
    return found


def added(parts: list[Batch], classes: int) -> Moments:
    moments = Moments.none(parts[0][0].shape[1])
    for features, labels in parts:
        moments = moments.add(features, labels, classes)
    return moments


def test_tasks_one_after_another_give_the_head_of_all_rows_at_once_in_any_order() -> None:
    parts = batches()
    rows, labels = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    strength = 1e-3
    absolute = strength * float(rows.square().sum()) / rows.shape[1]
    oracle = Ridge(alpha=absolute, fit_intercept=False, solver="cholesky").fit(rows.numpy(), np.eye(6)[labels.numpy()])
    together = solve(Moments.none(12).add(rows, labels, 6), strength)
    np.testing.assert_allclose(together.numpy(), oracle.coef_.T, rtol=1e-9, atol=1e-12)
    for order in permutations(parts):
        torch.testing.assert_close(solve(added(list(order), 6), strength), together, rtol=1e-10, atol=1e-13)


def test_classes_that_come_later_stand_behind_the_old() -> None:
    parts = batches()
    grown = Moments.none(12)
    for task, (features, labels) in enumerate(parts):
        grown = grown.add(features, labels, 2 * task + 2)
    torch.testing.assert_close(solve(grown, 0.1), solve(added(parts, 6), 0.1), rtol=1e-12, atol=0)
    half = added(parts[:1], 2) + added(parts[1:], 6)  # sums of other numbers of classes
    torch.testing.assert_close(solve(half, 0.1), solve(grown, 0.1), rtol=1e-10, atol=1e-13)


def test_held_out_errors_from_sums_are_those_of_the_rows() -> None:
    parts = batches()
    fitted, held = added([(x[::2], y[::2]) for x, y in parts], 6), added([(x[1::2], y[1::2]) for x, y in parts], 6)
    rows, labels = torch.cat([x[1::2] for x, _ in parts]), torch.cat([y[1::2] for _, y in parts])
    errors = held_out_errors(fitted, held)
    for strength, error in zip(STRENGTHS, errors, strict=True):
        residual = rows @ solve(fitted, strength) - torch.nn.functional.one_hot(labels, 6)
        assert float(error) == pytest.approx(float(residual.square().sum(1).mean()), rel=1e-6)
    best = STRENGTHS[int(errors.argmin())]
    assert choose_strength(fitted, held) == best
    assert STRENGTHS[0] < best < STRENGTHS[-1]


def test_random_features_are_the_same_again() -> None:
    projection = random_projection(4, 7, seed=3)
    assert torch.equal(projection, random_projection(4, 7, seed=3))
    assert not torch.equal(projection, random_projection(4, 7, seed=4))
    features = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    by_hand = [max(0.0, sum(float(features[0, i] * projection[i, j]) for i in range(4))) for j in range(7)]
    assert projected(features, projection)[0].tolist() == pytest.approx(by_hand, rel=1e-5)


def test_misuse() -> None:
    moments = Moments.none(3)
    with pytest.raises(ConfigError, match="has seen no rows"):
        solve(moments, 1.0)
    with pytest.raises(ShapeError, match="wanted \\[rows, 3\\]"):
        moments.add(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), 1)
    with pytest.raises(ShapeError, match="wanted at most 2"):
        moments.add(torch.zeros(2, 3), torch.tensor([0, 2]), 2)
    with pytest.raises(ConfigError, match="size"):
        strategy_of("ranpac", {"size": -1})
    with pytest.raises(ConfigError, match="ridge"):
        strategy_of("ranpac", {"ridge": 0})


# --- as a strategy ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_place(tmp_path_factory.mktemp("place"))
    for name in ("colours", "animals", "tools"):
        write_task(root, name)
    # colours once more, from other rows and under another name: the same labels
    for split in ("train", "test"):
        rows = (root / f"colours-{split}.csv").read_text().splitlines()
        (root / f"shades-{split}.csv").write_text("\n".join([rows[0], *rows[:0:-1]][:40]) + "\n")
    (root / "shades.yaml").write_text((root / "colours.yaml").read_text().replace("colours", "shades"))
    return root


PARAMETERS = {"size": 40, "layer": -1}


def features_by_hand(place: Path, name: str, split: str, limit: int) -> tuple[np.ndarray, Rows]:
    """Mean states of the last layer, one row at a time, through a random projection of the run's seed."""
    loaded = load_base(str(place / "base"), "classification")
    rows = load_rows(load_task(str(place / f"{name}.yaml")), split, limit=limit, seed=3)
    found = []
    for text in rows.texts:
        with torch.no_grad():
            states = loaded.model.base_model(**loaded.tokenizer(text, return_tensors="pt")).last_hidden_state
        found.append(states[0].mean(0))
    projection = torch.randn(32, 40, generator=torch.Generator().manual_seed(3))
    return np.maximum(0, torch.stack(found).numpy() @ projection.numpy()).astype(np.float64), rows


def test_class_incremental_is_ridge_on_all_classes_in_any_order(place: Path, tmp_path: Path) -> None:
    tasks = ("colours", "animals", "tools")
    runs = {}
    for order in (tasks, tasks[::-1]):
        report, versions, folder = short_run(
            place, tmp_path / order[0], "ranpac", order, scenario="class", parameters=PARAMETERS
        )
        runs[order] = (report, folder)
        assert all(not version.head_tensors() for version in versions)
        assert report.routing is None
    report, folder = runs[tasks]
    names = list(tasks)
    train = {name: features_by_hand(place, name, "train", 48) for name in names}
    test = {name: features_by_hand(place, name, "test", 30) for name in names}
    classes = [(name, label) for name in names for label in train[name][1].labels]
    h = np.concatenate([train[name][0] for name in names])
    y = np.array(
        [classes.index((name, train[name][1].labels[int(t)])) for name in names for t in train[name][1].targets]
    )
    kept = folder.kept(folder.commits()[-1])
    strength = kept.under("ridge").values["strength"]
    absolute = strength * np.square(h).sum() / 40
    weights = np.linalg.solve(h.T @ h + absolute * np.eye(40), h.T @ np.eye(len(classes))[y])
    for j, name in enumerate(names):
        best = (test[name][0] @ weights).argmax(1)
        right = [
            classes[i] == (name, test[name][1].labels[int(t)]) for i, t in zip(best, test[name][1].targets, strict=True)
        ]
        assert report.matrix[2][j] == pytest.approx(np.mean(right))
    assert report.summary.acc > 0.7  # chance is 1 of 7
    assert report.matrix[0][1:] == tuple(result.untrained for result in report.results[1:])
    backward = runs[tasks[::-1]][0]
    assert backward.matrix[2] == report.matrix[2][::-1]
    # G, C, W and no row: kept bytes do not depend on the rows
    gram = 40 * 41 // 2 * 8
    assert report.storage[-1]["ridge"] >= 2 * (gram + 40 * len(classes) * 8) + 40 * len(classes) * 4
    assert "adapters" not in report.storage[-1]


def test_domains_share_classes_and_tasks_with_an_id_only_their_own(place: Path, tmp_path: Path) -> None:
    domain, _, folder = short_run(
        place, tmp_path / "domain", "ranpac", ("colours", "shades"), scenario="domain", parameters=PARAMETERS
    )
    values = folder.kept(folder.commits()[-1]).under("ridge").values
    assert values["classes"] == [["", "cold"], ["", "warm"]]
    assert domain.matrix[0][1] > domain.results[1].untrained  # answered before it was learnt
    task, _, folder = short_run(place, tmp_path / "task", "ranpac", ("colours", "animals"), parameters=PARAMETERS)
    assert len(folder.kept(folder.commits()[-1]).under("ridge").values["classes"]) == 5
    assert min(task.matrix[1]) > 0.7


def test_the_first_task_may_teach_the_features(place: Path, tmp_path: Path) -> None:
    report, versions, _ = short_run(
        place, tmp_path, "ranpac", ("colours", "animals"), scenario="class", parameters={**PARAMETERS, "adapt": True}
    )
    first, second = (version.body_tensors() for version in versions)
    assert any(float(tensor.abs().max()) > 0 for key, tensor in first.items() if "lora_B" in key)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert versions[1].spec.lineage.parents[0].ref == "run@1"
    assert report.storage[-1]["adapters"] > 0
    assert report.summary.acc > 0.7
