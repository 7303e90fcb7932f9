"""The router against scikit-learn's LDA and scipy's Mahalanobis distance, on Gaussians made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from graftory.continual.router import ABSTAIN, Router, RouterSettings
from graftory.continual.router_file import load_router, save_router
from graftory.errors import ConfigError, CorruptAdapterError, ShapeError

WIDTH = 6


def gaussians(n: int, seed: int, tasks: int = 3, spread: float = 1.5) -> list[Tensor]:
    generator = np.random.default_rng(seed)
    shape = np.random.default_rng(0).normal(size=(WIDTH, WIDTH)) + 2 * np.eye(WIDTH)
    means = np.random.default_rng(1).normal(size=(tasks, WIDTH)) * spread
    return [torch.from_numpy(generator.normal(size=(n, WIDTH)) @ shape.T + mean) for mean in means]


def fitted(settings: RouterSettings, train: list[Tensor], validation: list[Tensor] | None = None) -> Router:
    router = Router(settings)
    for i, features in enumerate(train):
        router = router.add(f"task{i}", features, validation[i] if validation else None)
    return router


def test_one_centroid_and_no_shrinkage_is_linear_discriminant_analysis() -> None:
    train, test = gaussians(200, 2), torch.cat(gaussians(150, 3))
    router = fitted(RouterSettings(centroids=1, shrinkage=0.0), train)
    oracle = LinearDiscriminantAnalysis(solver="lsqr")
    oracle.fit(torch.cat(train).numpy(), np.repeat([0, 1, 2], 200))
    choice = router.route(test)
    assert choice.task.tolist() == oracle.predict(test.numpy()).tolist()
    assert len(set(choice.task.tolist())) == 3
    ours = (choice.scores - choice.scores.mean(1, keepdim=True)).numpy()
    theirs = oracle.decision_function(test.numpy())
    assert np.allclose(ours, theirs - theirs.mean(1, keepdims=True), atol=1e-8)


def test_distance_is_mahalanobis_with_the_shrunk_pooled_scatter() -> None:
    train, test = gaussians(80, 2), gaussians(5, 4)[0]
    router = fitted(RouterSettings(centroids=1, shrinkage=0.1), train)
    rows = [(features - features.mean(0)).numpy() for features in train]
    pooled = sum(row.T @ row for row in rows) / 240
    pooled = pooled + 0.1 * np.trace(pooled) / WIDTH * np.eye(WIDTH)
    assert np.allclose(router.covariance().numpy(), pooled)
    choice = router.route(test)
    for row, task, distance in zip(test, choice.task, choice.distance, strict=True):
        wanted = mahalanobis(row.numpy(), train[int(task)].mean(0).numpy(), np.linalg.inv(pooled)) ** 2
        assert float(distance) == pytest.approx(wanted)


def test_several_centroids_separate_what_one_cannot() -> None:
    # task a lies on both sides of task b on one line
    side = torch.linspace(-0.2, 0.2, 41)[:, None]
    a, b = torch.cat([side - 4, side + 4]), side
    rows = torch.cat([a, b])
    wanted = [0] * len(a) + [1] * len(b)
    several = fitted(RouterSettings(centroids=2, quantile=1), [a, b]).route(rows).task.tolist()
    one = fitted(RouterSettings(centroids=1, quantile=1), [a, b]).route(rows).task.tolist()
    assert several == wanted
    assert one != wanted


def test_order_of_arrival_changes_nothing_and_rows_are_not_revisited() -> None:
    train, test = gaussians(100, 2), torch.cat(gaussians(50, 3))
    settings = RouterSettings(centroids=3)
    forward = fitted(settings, train)
    backward = fitted(settings, train[::-1])
    assert torch.allclose(forward.covariance(), backward.covariance())
    assert forward.route(test).task.tolist() == [2 - task for task in backward.route(test).task.tolist()]
    assert forward.rows == 300


def test_the_bound_is_the_quantile_of_validation_distances_even_after_later_tasks() -> None:
    train, validation = gaussians(300, 2), gaussians(200, 3)
    train[2], validation[2] = train[2] * 3, validation[2] * 3  # a late task with another scatter
    router = fitted(RouterSettings(centroids=1), train, validation)
    inverse = np.linalg.inv(router.covariance().numpy())
    for i in range(3):
        mean = train[i].mean(0).numpy()
        distances = sorted((mahalanobis(row.numpy(), mean, inverse) ** 2 for row in validation[i]), reverse=True)
        assert float(router.bounds()[i]) == pytest.approx(distances[2])  # 2 of 200 lie outside 99 %
    assert all(len(task.tail) < 20 for task in router.tasks)


def test_foreign_rows_abstain_and_validation_rows_do_not() -> None:
    train, validation = gaussians(300, 2, spread=8.0), gaussians(200, 3, spread=8.0)
    router = fitted(RouterSettings(centroids=2), train, validation)
    foreign = torch.full((4, WIDTH), 200.0) * torch.tensor([[1.0], [-1.0], [2.0], [-2.0]])
    assert router.route(foreign).task.tolist() == [ABSTAIN] * 4
    chosen = router.route(torch.cat(validation)).task
    assert 1 <= int((chosen == ABSTAIN).sum()) <= 8
    never = fitted(RouterSettings(centroids=2, quantile=1), train, validation)
    assert ABSTAIN not in never.route(foreign).task.tolist()


def test_a_saved_router_is_the_same_router(tmp_path: Path) -> None:
    router = fitted(RouterSettings(centroids=2, seed=7), gaussians(60, 2), gaussians(40, 3))
    save_router(router, tmp_path / "router.safetensors")
    loaded = load_router(tmp_path / "router.safetensors")
    test = torch.cat(gaussians(30, 5))
    assert loaded.settings == router.settings
    assert torch.equal(loaded.route(test).scores, router.route(test).scores)
    assert torch.equal(loaded.bounds(), router.bounds())
    more = gaussians(20, 6)[0] + 9
    assert torch.equal(loaded.add("new", more).covariance(), router.add("new", more).covariance())


def test_a_file_that_is_no_router_is_named(tmp_path: Path) -> None:
    path = tmp_path / "router.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(CorruptAdapterError, match="cannot be read as a router"):
        load_router(path)


def test_fewer_distinct_rows_than_centroids() -> None:
    router = Router(RouterSettings()).add("a", torch.ones(4, 2)).add("b", torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
    assert [len(task.centroids) for task in router.tasks] == [1, 2]


def test_misuse() -> None:
    router = Router(RouterSettings()).add("a", torch.randn(9, 3))
    with pytest.raises(ConfigError, match="knows task 'a' already"):
        router.add("a", torch.randn(9, 3))
    with pytest.raises(ShapeError, match="wanted \\[rows, 3\\]"):
        router.add("b", torch.randn(9, 4))
    with pytest.raises(ShapeError, match="wanted \\[rows, 3\\]"):
        router.route(torch.randn(9, 4))
    with pytest.raises(ConfigError, match="knows no task"):
        Router(RouterSettings()).covariance()
    with pytest.raises(ConfigError, match="quantile"):
        RouterSettings(quantile=0)
