"""Tuned merges: clusters by trying all, weights in closed form, mixtures against models that were really merged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import scipy.stats
import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.compose import merge
from graftory.compose.merge.adamerging import AdamergingParameters
from graftory.compose.merge.lego import LegoParameters
from graftory.compose.merge.lorahub import LorahubParameters
from graftory.compose.merge.tuning import tune_layers, tune_weights
from graftory.compose.merge.tuning.adamerging import entropy_of, layer_of, pattern_of
from graftory.compose.merge.tuning.lorahub import search
from graftory.data import load_rows, load_task
from graftory.errors import ConfigError, MergeError
from graftory.training import Job, evaluate
from graftory.training.prediction import Query, score
from tests.merge_home import Home, make_home
from tests.merge_oracles import regauged, triplets, weighted
from tests.test_compose_merge import SITES, delta, lora, relative


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_home(tmp_path_factory.mktemp("tuning"))


def two() -> list[Adapter]:
    return [lora(1, rank=2, targets=SITES[:1]), lora(2, rank=2, targets=SITES[:1])]


def units_of(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[Tensor]:
    """The rank-1 parts of the weighted updates, as dense matrices."""
    found = []
    for adapter, weight in zip(adapters, weights, strict=True):
        u, s, vt = triplets(weight * delta(adapter, SITES[0]))
        found += [s[i] * torch.outer(u[:, i], vt[i]) for i in range(len(s))]
    return found


def spread(units: Sequence[Tensor]) -> float:
    mean = torch.stack(list(units)).mean(0)
    return sum(float((unit - mean).square().sum()) for unit in units)


@pytest.mark.parametrize("reweight", [True, False])
def test_lego_is_the_best_of_all_ways_to_group_the_units(reweight: bool) -> None:
    adapters, weights = two(), [1.0, -0.7]
    units = units_of(adapters, weights)
    labelings = [one for one in itertools.product(range(2), repeat=len(units)) if len(set(one)) == 2]
    groups = [[[u for u, at in zip(units, one, strict=True) if at == c] for c in range(2)] for one in labelings]
    best = min(groups, key=lambda group: sum(map(spread, group)))
    wanted = torch.zeros_like(units[0])
    for group in best:
        u, s, vt = triplets(torch.stack(group).mean(0))
        size = sum(float(unit.norm()) for unit in group) / len(group) if reweight else float(s[0])
        wanted += size * torch.outer(u[:, 0], vt[0])
    merged = merge(adapters, "lego", weights=weights, parameters=LegoParameters(rank=2, reweight=reweight))
    assert relative(delta(merged, SITES[0]), wanted) < 1e-5


def test_lego_with_a_cluster_for_each_unit_is_the_sum() -> None:
    adapters, weights = two(), [0.5, 2.0]
    whole = weighted([delta(adapter, SITES[0]) for adapter in adapters], weights)
    merged = merge(adapters, "lego", weights=weights, parameters=LegoParameters(rank=9, reweight=False))
    assert relative(delta(merged, SITES[0]), whole) < 1e-6
    scaled = merge(adapters, "lego", weights=weights, parameters=LegoParameters(rank=4))
    assert relative(delta(scaled, SITES[0]), math.sqrt(2 / 4) * whole) < 1e-6


def test_lego_of_copies_is_the_adapter_itself() -> None:
    one = lora(1, targets=SITES[:1])
    merged = merge([one, regauged(one, 1), regauged(one, 2)], "lego")
    assert relative(delta(merged, SITES[0]), delta(one, SITES[0])) < 1e-4


def test_lorahub_finds_what_the_penalty_leaves_of_a_parabola() -> None:
    """min (w − t)² + l1 |w| is t − l1/2 towards 0, and 0 for small t."""
    target = (0.8, -0.6, 0.02)
    parameters = LorahubParameters(l1=0.1, tries=400)
    found = search(lambda w: sum((a - b) ** 2 for a, b in zip(w, target, strict=True)), 3, parameters)
    assert found.weights == pytest.approx((0.75, -0.55, 0.0), abs=0.01)
    assert found.objective == pytest.approx(found.loss + 0.1 * sum(map(abs, found.weights)))
    assert found.base_loss == pytest.approx(sum(t * t for t in target))
    assert found.tries <= 400
    bounded = search(lambda w: (w[0] - 9) ** 2, 1, LorahubParameters(bound=1.5, l1=0.0))
    assert bounded.weights == (1.5,)


def test_lorahub_says_when_nothing_helps() -> None:
    with pytest.raises(MergeError, match="lowers the loss of the bare base"):
        search(lambda w: sum(map(abs, w)), 2, LorahubParameters())


def test_lorahub_on_rows(home: Home) -> None:
    adapters = [home.adapters[name] for name in ("pair", "two")]
    task = load_task(home.task("two"))
    rows = load_rows(task, "train", limit=12)
    parameters = LorahubParameters(tries=12)
    found = tune_weights(home.loaded, adapters, task, rows, parameters)
    merged = merge(adapters, "lorahub", weights=found.weights, parameters=parameters)
    head = None if merged.head_tensors() else adapters[1]
    (metrics,) = evaluate(home.loaded, [Job("merged", merged, head, task, rows)])
    assert found.loss == pytest.approx(metrics[-1].value, rel=1e-5)
    assert found.loss < found.base_loss
    three = load_task(home.task("three"))
    with pytest.raises(ConfigError, match="none of the adapters has a head for three"):
        tune_weights(home.loaded, adapters, three, load_rows(three, "train", limit=4), parameters)


def test_entropy_and_layers() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert entropy_of(logits).tolist() == pytest.approx(
        scipy.stats.entropy(logits.softmax(1).numpy(), axis=1), rel=1e-5
    )
    assert layer_of("bert.encoder.layer.3.attention.self.query") == "bert.encoder.layer.3"
    assert layer_of("encoder.block.0.layer.1.wi") == "encoder.block.0"
    assert (layer_of("lm_head"), pattern_of("lm_head"), pattern_of("h.2")) == ("lm_head", "lm_head", "h.2.*")


def entropy_of_merged(
    home: Home, adapters: Sequence[Adapter], texts: Sequence[Sequence[str]], weights: object
) -> float:
    """Mean over tasks of the mean entropy, by a model that is really merged."""
    merged = merge(adapters, "adamerging", weights=weights)  # type: ignore[arg-type]
    means = []
    for adapter, some in zip(adapters, texts, strict=True):
        queries = [Query(text, merged, adapter, adapter.spec.task) for text in some]
        rows = [row.logits for row in score(home.loaded, queries)]
        means.append(sum(float(scipy.stats.entropy(row.softmax(0))) for row in rows if row is not None) / len(some))
    return sum(means) / len(means)


def test_adamerging_is_as_sure_as_the_merged_model_and_surer_than_before(home: Home) -> None:
    adapters = list(home.adapters.values())
    texts = [load_rows(load_task(home.task(name)), "train", limit=10).texts for name in home.adapters]
    parameters = AdamergingParameters(steps=15, step_size=0.05, step_rows=5)
    found = tune_layers(home.loaded, adapters, texts, parameters)
    plain: list[list[str]] = [[str(text) for text in some] for some in texts]
    assert found.before == pytest.approx(entropy_of_merged(home, adapters, plain, [0.3] * 3), rel=1e-4)
    assert found.after == pytest.approx(entropy_of_merged(home, adapters, plain, found.weights), rel=1e-4)
    assert found.after < found.before
    assert len(found.weights) == 2
    assert len({value for row in found.weights.values() for value in row}) == 6
    assert all(0 <= value <= 1 for row in found.weights.values() for value in row)
    assert tune_layers(home.loaded, adapters, texts, parameters) == found


def test_the_first_step_goes_down_the_slope_of_the_merged_models_entropy(home: Home) -> None:
    """Adam's first step is the sign of the gradient; here by finite differences of merged models."""
    adapters = [home.adapters["two"], home.adapters["three"]]
    texts = [[str(t) for t in load_rows(load_task(home.task(n)), "train", limit=4).texts] for n in ("two", "three")]
    found = tune_layers(home.loaded, adapters, texts, AdamergingParameters(steps=1, step_size=0.01, step_rows=4))
    for layer, row in found.weights.items():
        for number in range(2):
            ends = []
            for change in (0.02, -0.02):
                weights = {name: [0.3, 0.3] for name in found.weights}
                weights[layer][number] += change
                ends.append(entropy_of_merged(home, adapters, texts, weights))
            assert abs(ends[0] - ends[1]) > 1e-6, "the slope is no rounding"
            assert row[number] == pytest.approx(0.3 - math.copysign(0.01, ends[0] - ends[1]), abs=1e-5)


def test_adamerging_needs_classifiers_and_inputs(home: Home) -> None:
    adapters = list(home.adapters.values())
    with pytest.raises(ConfigError, match="no classifier with a head"):
        tune_layers(home.loaded, [lora(1)], [["w1"]])
    with pytest.raises(ConfigError, match="wanted inputs of every adapter's task"):
        tune_layers(home.loaded, adapters, [["w1"]])
