"""The router against scikit-learn's LDA and scipy's Mahalanobis distance, on Gaussians made by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from graftory.adapter import Adapter
from graftory.config import LoraConfig
from graftory.continual.evaluation import TestSet, mixture_right, routed_cell
from graftory.continual.router import ABSTAIN, Router, RouterSettings
from graftory.continual.router_file import load_router, save_router
from graftory.continual.router_view import bound
from graftory.continual.strategies import Answer
from graftory.continual.triangle import packed, unpacked
from graftory.errors import ConfigError, CorruptAdapterError, ShapeError
from graftory.settings import TrainSettings
from graftory.training.base import LoadedBase
from graftory.training.company import encoded
from graftory.training.encode import Collator
from graftory.training.evaluation import Measured, evaluate_rows
from graftory.training.features import depth_of, features_of, layer_features_of
from graftory.training.learning import train
from graftory.training.losses import model_inputs
from tests.training_samples import tiny_base, tiny_rows, tiny_task

WIDTH = 6


def gaussians(n: int, seed: int, tasks: int = 3, spread: float = 1.5) -> list[Tensor]:
    generator = np.random.default_rng(seed)
    shape = np.random.default_rng(0).normal(size=(WIDTH, WIDTH)) + 2 * np.eye(WIDTH)
    means = np.random.default_rng(1).normal(size=(tasks, WIDTH)) * spread
    return [torch.from_numpy(generator.normal(size=(n, WIDTH)) @ shape.T + mean) for mean in means]


def settings(**changes: object) -> RouterSettings:
    return RouterSettings(**{"layers": (0,), "centroids": 1, "quantile": 0.99, **changes})  # type: ignore[arg-type]


def fitted(chosen: RouterSettings, train_rows: list[Tensor], validation: list[Tensor] | None = None) -> Router:
    router = Router.on(chosen, 0)
    for i, features in enumerate(train_rows):
        held = validation[i][:, None] if validation else None
        router = router.add(f"task{i}", features[:, None], held)
    return router


def covariance(router: Router) -> Tensor:
    return router.view.covariance(router.settings.shrinkage)


def bounds(router: Router) -> Tensor:
    return router.view.bounds(router.settings.shrinkage, router.settings.quantile)


def chosen(router: Router, rows: Tensor) -> list[int]:
    return [int(task) for task in router.route(rows[:, None]).task]


def test_one_centroid_and_no_shrinkage_is_linear_discriminant_analysis() -> None:
    rows, test = gaussians(200, 2), torch.cat(gaussians(150, 3))
    router = fitted(settings(shrinkage=0.0), rows)
    oracle = LinearDiscriminantAnalysis(solver="lsqr")
    oracle.fit(torch.cat(rows).numpy(), np.repeat([0, 1, 2], 200))
    choice = router.route(test[:, None])
    assert choice.task.tolist() == oracle.predict(test.numpy()).tolist()
    assert len(set(choice.task.tolist())) == 3
    ours = (choice.scores - choice.scores.mean(1, keepdim=True)).numpy()
    theirs = oracle.decision_function(test.numpy())
    assert np.allclose(ours, theirs - theirs.mean(1, keepdims=True), atol=1e-8)
    assert np.allclose(choice.posterior.numpy(), oracle.predict_proba(test.numpy()), atol=1e-8)


def test_a_centroid_for_each_label_is_lda_on_labels_summed_over_each_task_s() -> None:
    rows, test = gaussians(120, 2, tasks=5), torch.cat(gaussians(40, 3, tasks=5))
    sizes = [120, 40, 100, 60, 80]  # labels 0 and 1 are of task a, 2 to 4 of task b: 160 and 240 rows
    parts = [features[:size] for features, size in zip(rows, sizes, strict=True)]
    router = Router.on(settings(shrinkage=0.0, smoothing=0.0), 0)
    for name, own in (("a", (0, 1)), ("b", (2, 3, 4))):
        labels = torch.cat([torch.full((sizes[i],), 10 * i) for i in own])  # label numbers need not be dense
        router = router.add(name, torch.cat([parts[i] for i in own])[:, None], labels=labels)
    # both tasks are equally frequent, whatever their rows; within a task labels are as frequent as they are
    priors = [0.5 * 120 / 160, 0.5 * 40 / 160, 0.5 * 100 / 240, 0.5 * 60 / 240, 0.5 * 80 / 240]
    oracle = LinearDiscriminantAnalysis(solver="lsqr", priors=priors)
    oracle.fit(torch.cat(parts).numpy(), np.repeat(range(5), sizes))
    # scikit-learn weighs the classes' scatters by the priors; ours is the pooled one
    pooled = covariance(router).numpy()
    oracle.coef_ = np.linalg.solve(pooled, oracle.means_.T).T
    oracle.intercept_ = -0.5 * np.diag(oracle.means_ @ oracle.coef_.T) + np.log(priors)
    theirs = oracle.predict_proba(test.numpy())
    wanted = np.stack([theirs[:, :2].sum(1), theirs[:, 2:].sum(1)], 1)
    assert np.allclose(router.route(test[:, None]).posterior.numpy(), wanted, atol=1e-8)


def test_centroids_are_the_posterior_means_around_their_task_s_mean() -> None:
    # label 0 has one row at 8, label 1 three rows at 0: the task's mean is 2; 2 rows more at 2 each: 4 and 0.8
    features = torch.tensor([[8.0], [0.0], [0.0], [0.0]])
    router = Router.on(settings(smoothing=2.0), 0).add("a", features[:, None], labels=torch.tensor([0, 1, 1, 1]))
    task = router.view.tasks[0]
    assert torch.allclose(task.centroids[:, 0], torch.tensor([4.0, 0.8], dtype=torch.float64))
    assert torch.equal(task.shares, torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert router.view.covariance(0).tolist() == [[0.0]]  # the scatter is around the labels' own means


def test_labels_with_few_rows_take_no_rows_from_other_tasks() -> None:
    # 50 labels of 4 rows each that mean nothing, beside a task of two labels: their centroids are noise
    def drawn(seed: int, rows: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(rows, 60, generator=generator) + shift for shift in (0.0, 0.4)]

    labels = [torch.arange(200) % count for count in (50, 2)]
    right = {}
    for smoothing in (0.0, 5.0):
        router = Router.on(settings(smoothing=smoothing, quantile=1), 0)
        for i, rows in enumerate(drawn(1, 200)):
            router = router.add(f"task{i}", rows[:, None], labels=labels[i])
        right[smoothing] = sum(chosen(router, rows).count(i) for i, rows in enumerate(drawn(2, 500)))
    assert right[5.0] > right[0.0] + 30


def test_distance_is_mahalanobis_with_the_shrunk_pooled_scatter() -> None:
    train_rows, test = gaussians(80, 2), gaussians(5, 4)[0]
    router = fitted(settings(shrinkage=0.1), train_rows)
    rows = [(features - features.mean(0)).numpy() for features in train_rows]
    pooled = sum(row.T @ row for row in rows) / 240
    pooled = pooled + 0.1 * np.trace(pooled) / WIDTH * np.eye(WIDTH)
    assert np.allclose(covariance(router).numpy(), pooled)
    choice = router.route(test[:, None])
    for row, task, distance in zip(test, choice.task, choice.distance, strict=True):
        wanted = mahalanobis(row.numpy(), train_rows[int(task)].mean(0).numpy(), np.linalg.inv(pooled)) ** 2
        assert float(distance) == pytest.approx(wanted)


def test_several_centroids_separate_what_one_cannot() -> None:
    # task a lies on both sides of task b on one line
    side = torch.linspace(-0.2, 0.2, 41)[:, None]
    a, b = torch.cat([side - 4, side + 4]), side
    rows = torch.cat([a, b])
    wanted = [0] * len(a) + [1] * len(b)
    assert chosen(fitted(settings(centroids=2, quantile=1), [a, b]), rows) == wanted
    assert chosen(fitted(settings(centroids=1, quantile=1), [a, b]), rows) != wanted


def test_order_of_arrival_changes_nothing_and_rows_are_not_revisited() -> None:
    rows, test = gaussians(100, 2), torch.cat(gaussians(50, 3))
    forward = fitted(settings(centroids=3), rows)
    backward = fitted(settings(centroids=3), rows[::-1])
    assert torch.allclose(covariance(forward), covariance(backward))
    assert chosen(forward, test) == [2 - task for task in chosen(backward, test)]
    assert forward.view.rows == 300


def test_the_bound_is_the_quantile_of_validation_distances_even_after_later_tasks() -> None:
    rows, validation = gaussians(300, 2), gaussians(200, 3)
    rows[2], validation[2] = rows[2] * 3, validation[2] * 3  # a late task with another scatter
    router = fitted(settings(), rows, validation)
    inverse = np.linalg.inv(covariance(router).numpy())
    for i in range(3):
        mean = rows[i].mean(0).numpy()
        distances = sorted((mahalanobis(row.numpy(), mean, inverse) ** 2 for row in validation[i]), reverse=True)
        assert float(bounds(router)[i]) == pytest.approx(distances[2])  # 2 of 200 lie outside 99 %
    assert all(len(task.tail) < 20 for task in router.view.tasks)


def test_a_bound_finer_than_the_rows_can_tell_goes_on_with_their_tail() -> None:
    # 101 draws from an exponential tail by its quantiles: of mean 2, behind 5
    ranks = torch.arange(1, 102, dtype=torch.float64)
    tail = 5 - 2 * torch.log(ranks / 101.5)
    assert bound(tail, 1000, 0.99) == float(tail[10])  # 10 of 1,000 outside
    fine = bound(
        tail, 1000, 0.9999
    )  # a tenth of a row in 1,000: ln(101.5 / 0.1) · 2 behind 5, but for the mean's error
    assert fine == pytest.approx(5 + 2 * math.log(101.5 / 0.1), rel=0.03)
    assert fine > float(tail[0])
    assert bound(tail[:1], 3, 0.999) == float(tail[0])  # one row has no tail to go on with
    # fresh rows of the same kind: at 0.999 about 1 in 1,000 is beyond, where the farthest of 100 lets 1 in 100 out
    generator = np.random.default_rng(0)
    beyond = []
    for _ in range(300):
        rows = torch.from_numpy(np.sort(generator.chisquare(20, 100))[::-1][:16].copy())
        beyond.append(float(scipy.stats.chi2.sf(bound(rows, 100, 0.999), 20)))
    assert 2e-4 < np.mean(beyond) < 2.5e-3


def test_foreign_rows_abstain_and_validation_rows_do_not() -> None:
    rows, validation = gaussians(300, 2, spread=8.0), gaussians(200, 3, spread=8.0)
    router = fitted(settings(centroids=2), rows, validation)
    foreign = torch.full((4, WIDTH), 200.0) * torch.tensor([[1.0], [-1.0], [2.0], [-2.0]])
    assert chosen(router, foreign) == [ABSTAIN] * 4
    assert 1 <= chosen(router, torch.cat(validation)).count(ABSTAIN) <= 8
    never = fitted(settings(centroids=2, quantile=1), rows, validation)
    assert ABSTAIN not in chosen(never, foreign)


# --- which layer -----------------------------------------------------------------------------------------------------


def sided(seed: int) -> list[Tensor]:
    """Three tasks whose middle layer of three tells them apart; the other two are noise. [N, 3, width]."""
    noise = torch.randn(2, 3, 150, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [torch.stack([noise[0, i], rows, noise[1, i]], 1) for i, rows in enumerate(gaussians(150, seed))]


def test_the_layer_is_chosen_by_held_out_rows_of_each_task_as_it_arrives() -> None:
    router = Router.on(settings(layers=()), 2)
    assert [view.layers for view in router.views] == [(0,), (1,), (2,), (0, 1, 2)]
    rows, held = sided(2), sided(3)
    counts = dict.fromkeys(range(4), 0)
    for i in range(3):
        router = router.add(f"task{i}", rows[i], held[i])
        for v, view in enumerate(router.views):  # the same by hand: a router of one view, asked about the newest task
            own = Router.on(settings(layers=view.layers, quantile=1), 2)
            for j in range(i + 1):
                own = own.add(f"task{j}", rows[j][:, list(view.layers)])
            counts[v] += int((own.route(held[i][:, list(view.layers)]).task == i).sum())
    assert [view.right for view in router.views] == list(counts.values())
    assert router.held_out == 450
    assert router.view.layers in ((1,), (0, 1, 2))
    # the joined layers are preferred unless they are worse by more than a standard error
    best = max(counts.values())
    error = (450 * (best / 450) * (1 - best / 450)) ** 0.5
    assert router.view.layers == ((0, 1, 2) if counts[3] >= best - error else (1,))
    test = torch.cat(sided(4))
    alone = Router.on(settings(layers=router.view.layers), 2)
    for i in range(3):
        alone = alone.add(f"task{i}", rows[i][:, list(router.view.layers)], held[i][:, list(router.view.layers)])
    assert torch.equal(router.route(test).scores, alone.route(test[:, list(router.view.layers)]).scores)


def test_layers_that_are_asked_for() -> None:
    assert RouterSettings(layers=(-1, 0)).views(6) == ((6, 0),)
    assert RouterSettings().views(30) == ((0,), (5,), (10,), (15,), (20,), (25,), (30,), (0, 10, 20, 30))
    assert RouterSettings().views(1) == ((0,), (1,), (0, 1))
    for layers in ((7,), (-8,), (6, -1)):
        with pytest.raises(ConfigError, match="wanted different ones of 0 to 6"):
            RouterSettings(layers=layers).views(6)


def test_features_of_layers_are_the_mean_of_each_layer_s_states(tmp_path: Path) -> None:
    loaded = tiny_base("classification", tmp_path / "base")
    texts = [str(text) for text in tiny_rows("classification").texts[:7]]
    depth = depth_of(loaded)
    found = layer_features_of(loaded, texts, range(depth + 1), batch_size=3)
    for row, text in enumerate(texts):
        with torch.no_grad():
            output = loaded.model.base_model(**loaded.tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        wanted = torch.stack([states[0].mean(0) for states in output.hidden_states])
        torch.testing.assert_close(found[row], wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[:, -1], features_of(loaded, texts), atol=1e-5, rtol=1e-4)


def test_texts_of_as_many_tokens_are_read_together(tmp_path: Path) -> None:
    loaded = tiny_base("classification", tmp_path / "base")
    texts = [f"{'i' * letters} {'a ' * words}" for letters, words in ((90, 2), (1, 9), (80, 3), (2, 8))]
    lengths = sorted(len(loaded.tokenizer(text).input_ids) for text in texts)
    widths: list[int] = []
    hook = loaded.model.base_model.register_forward_pre_hook(
        lambda _, given, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    found = layer_features_of(loaded, texts, [0], batch_size=2)
    hook.remove()
    assert widths == [lengths[1], lengths[3]]
    assert widths[0] < widths[1]
    for row, text in enumerate(texts):  # in the order they were given
        torch.testing.assert_close(found[row], layer_features_of(loaded, [text], [0])[0], atol=1e-5, rtol=1e-4)


# --- tasks that share their labels -----------------------------------------------------------------------------------


def test_a_mixture_weighs_the_answers_by_the_posterior(tmp_path: Path) -> None:
    """Against plain forward passes: Σ p(t | x) softmax(logits_t(x)), one row at a time."""
    from graftory.adapters import attach

    loaded = tiny_base("classification", tmp_path / "base")
    task, rows = tiny_task("classification"), tiny_rows("classification")
    adapters = [
        train(loaded, task, rows, LoraConfig(rank=2), TrainSettings(max_steps=steps, learning_rate=0.05), name="a")
        for steps in (1, 12)
    ]
    keep = list(range(1, len(rows), 2))
    weights = torch.rand(len(keep), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = weights / weights.sum(1, keepdim=True)
    adapted = attach(loaded.model, {"a": adapters[0], "b": adapters[1]})
    right = 0
    examples = encoded(loaded, task, rows)
    for row, weight in zip(keep, weights, strict=True):
        batch = Collator(loaded.tokenizer.pad_token_id)([examples[row]])
        mixed = torch.zeros(len(rows.labels), dtype=torch.float64)
        for share, name in zip(weight, ("a", "b"), strict=True):
            with torch.no_grad(), adapted.route(name):
                logits = adapted(**model_inputs("classification", batch)).logits
            mixed += share * logits[0, : len(rows.labels)].double().softmax(0)
        right += int(mixed.argmax()) == rows.targets[row]
    adapted.detach()
    answers = [Answer(adapter, adapter) for adapter in adapters]
    assert mixture_right(loaded, TestSet(task, rows), keep, answers, weights, 8) == right
    assert mixture_right(loaded, TestSet(task, rows), [], answers, weights[:0], 8) == 0
    # with all weight on one task, a routed cell is that task's own score: both are asked, one decides
    cells = routed_cells(tmp_path, adapters)
    assert cells["mixture"] == cells["best"]


def routed_cells(folder: Path, adapters: list[Adapter]) -> Mapping[str, float | None]:
    loaded = tiny_base("classification", folder / "other")
    task, rows = tiny_task("classification"), tiny_rows("classification")
    far = torch.zeros(len(rows), 1, WIDTH)
    noise = torch.randn(60, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    found = {}
    for way in ("best", "mixture"):
        router = Router.on(settings(quantile=1, answer=way), 0).add("a", noise + 40).add("b", noise)
        tests = [TestSet(replace(task, name=name), rows) for name in ("a", "b")]
        answers = {name: Answer(adapter, adapter) for name, adapter in zip(("a", "b"), adapters, strict=True)}
        cell = routed_cell(loaded, 2, 0, tests, answers, router, router.route(far), 8)
        assert cell.routes == {"b": len(rows)}
        found[way] = cell.value
    return found


def test_rows_sent_to_their_own_task_are_taken_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the rows go home, half to a task with the same labels: only these are run; the value is that of all."""
    from graftory.continual import evaluation
    from graftory.training.evaluation import Job

    loaded = tiny_base("classification", tmp_path / "base")
    task, rows = tiny_task("classification"), tiny_rows("classification")
    one, two = (
        train(loaded, task, rows, LoraConfig(rank=2), TrainSettings(max_steps=n, learning_rate=0.05), name="a")
        for n in (1, 12)
    )
    tests = [TestSet(replace(task, name=name), rows) for name in ("a", "b", "c")]
    answers = {"a": Answer(None, one), "b": Answer(one, one), "c": Answer(two, two)}  # a has not been learnt
    noise = torch.randn(60, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    router = Router.on(settings(quantile=1), 0).add("b", noise).add("c", noise + 40)
    features = torch.arange(len(rows))[:, None, None] % 2 * 40 + torch.zeros(len(rows), 1, WIDTH)
    choice = router.route(features)
    told = evaluation.oracle_cell(loaded, 2, 1, tests[1], answers["b"], 8).right
    run: list[int] = []

    def counted(base: LoadedBase, jobs: list[Job], *, batch_size: int) -> tuple[Measured, ...]:
        run.extend(len(job.rows) for job in jobs)
        return evaluate_rows(base, jobs, batch_size=batch_size)

    monkeypatch.setattr(evaluation, "evaluate_rows", counted)
    whole = routed_cell(loaded, 2, 1, tests, answers, router, choice, 8)
    assert run == [len(rows) // 2] * 2
    cell = routed_cell(loaded, 2, 1, tests, answers, router, choice, 8, told)
    assert run == [len(rows) // 2] * 3
    assert cell == whole
    assert 0 < sum(told) < len(told)
    never = routed_cell(loaded, 2, 1, tests, answers, router, choice, 8, [False] * len(rows))
    assert cell.value is not None
    assert never.value == pytest.approx(cell.value - sum(told[::2]) / len(rows))


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_triangle_is_half_of_a_symmetric_matrix() -> None:
    matrix = torch.tensor([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]])
    assert packed(matrix).tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.equal(unpacked(packed(matrix)), matrix)


def test_a_saved_router_is_the_same_router(tmp_path: Path) -> None:
    router = Router.on(settings(layers=(), centroids=2, seed=7), 2)
    for i, (rows, held) in enumerate(zip(sided(2), sided(3), strict=True)):
        router = router.add(f"task{i}", rows, held)
    save_router(router, tmp_path / "router.safetensors")
    loaded = load_router(tmp_path / "router.safetensors")
    test = torch.cat(sided(5))
    assert loaded.settings == router.settings
    assert (loaded.names, loaded.view.layers, loaded.held_out) == (router.names, router.view.layers, router.held_out)
    assert torch.equal(loaded.route(test).scores, router.route(test).scores)
    assert torch.equal(bounds(loaded), bounds(router))
    more = sided(6)[0] + 9
    assert torch.equal(covariance(loaded.add("new", more)), covariance(router.add("new", more)))


def test_a_file_that_is_no_router_is_named(tmp_path: Path) -> None:
    path = tmp_path / "router.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(CorruptAdapterError, match="cannot be read as a router"):
        load_router(path)


def test_fewer_distinct_rows_than_centroids() -> None:
    b = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    router = fitted(settings(centroids=5), [torch.ones(4, 2), b])
    assert [len(task.centroids) for task in router.view.tasks] == [1, 2]


def test_misuse() -> None:
    router = Router.on(settings(), 0).add("a", torch.randn(9, 1, 3))
    with pytest.raises(ConfigError, match="knows task 'a' already"):
        router.add("a", torch.randn(9, 1, 3))
    with pytest.raises(ShapeError, match="wanted \\[rows, 3\\]"):
        router.add("b", torch.randn(9, 1, 4))
    with pytest.raises(ShapeError, match="wanted \\[rows, 3\\]"):
        router.route(torch.randn(9, 1, 4))
    with pytest.raises(ShapeError, match="wanted \\[rows, 1 layers, width\\]"):
        router.route(torch.randn(9, 3))
    with pytest.raises(ConfigError, match="knows no task"):
        Router.on(settings(), 0).route(torch.randn(9, 1, 3))
    with pytest.raises(ConfigError, match="quantile"):
        RouterSettings(quantile=0)
