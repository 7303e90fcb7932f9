"""Tuned merges: clusters by trying all, weights in closed form, mixtures against models that were really merged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import scipy.stats
import torch
from torch import Tensor

from graftory.adapter import Adapter, Lineage
from graftory.compose import merge, merge_again, merge_without
from graftory.compose.merge.adamerging import AdamergingParameters
from graftory.compose.merge.judging import ALL, Bench, Trial, Verdict, task_of, trials_of, unseen_rows
from graftory.compose.merge.lego import LegoParameters
from graftory.compose.merge.lorahub import LorahubParameters
from graftory.compose.merge.temperature import calibrated, temperature_of
from graftory.compose.merge.tuning import PORTFOLIO, AutoParameters, Candidate, auto_merge, tune_layers, tune_weights
from graftory.compose.merge.tuning.adamerging import entropy_of, layer_of, pattern_of
from graftory.compose.merge.tuning.lorahub import search
from graftory.compose.merge.tuning.race import Entrant, Judged, judged, looks, race
from graftory.compose.record import record_examples
from graftory.data import Rows, load_rows, load_task
from graftory.errors import ConfigError, MergeError
from graftory.hub import Hub
from graftory.training import Job, evaluate
from graftory.training.prediction import Query, Scored, score
from tests.merge_home import Home, make_home
from tests.merge_oracles import regauged, triplets, weighted
from tests.test_compose_merge import SITES, bottleneck, delta, lora, relative


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


def test_trials_are_read_with_their_own_heads(home: Home) -> None:
    bench = Bench(trials_of(home.adapters, 24, split="test"))
    for number, (name, adapter) in enumerate(home.adapters.items()):
        assert bench.judge_on(adapter, number).value == 1.0
        task = load_task(home.task(name))
        (metrics,) = evaluate(home.loaded, [Job("base", None, adapter, task, load_rows(task, "test"))])
        assert bench.judge_on(None, number).value == pytest.approx(metrics[0].value)
    assert 1 / 3 < bench.judge_on(home.adapters["three"], 1).likelihood <= 1
    with pytest.raises(ConfigError, match="does not name the task"):
        trials_of({"plain": lora(1)}, 4)


def test_rows_that_an_adapter_has_seen_are_left_out(home: Home) -> None:
    adapter = home.adapters["two"]
    task = task_of("two", adapter)
    seen = load_rows(task, "train", limit=10, seed=3)
    told = replace(
        adapter.spec.lineage, seed=3, data_hash=seen.hash, parameters={**adapter.spec.lineage.parameters, "rows": 10}
    )
    trained = replace(adapter, spec=replace(adapter.spec, lineage=told))
    fresh = unseen_rows(trained, task, 8, 0)
    assert len(fresh) == 8
    assert not set(fresh.texts) & set(seen.texts)
    assert set(unseen_rows(trained, task, 20, 0).texts) & set(seen.texts), "there are not so many others"
    seen = load_rows(task, "train", limit=6, seed=3)
    told = replace(told, data_hash=seen.hash, parameters={**told.parameters, "rows": 6})
    fresh = unseen_rows(replace(adapter, spec=replace(adapter.spec, lineage=told)), task, 20, 0)
    assert len(fresh) == 18, "so many others are better than 20 of all"
    assert not set(fresh.texts) & set(seen.texts)


FEW = (
    Candidate("linear, sum", "linear", 1.0, floor="task arithmetic"),
    Candidate("tsv", "tsv"),
    Candidate("soup", "soup"),
    Candidate("regmean", "regmean"),
    Candidate("fisher", "fisher"),
)


def test_auto_keeps_what_is_best_and_its_record_makes_it_again(home: Home) -> None:
    from graftory.adapter import Parent

    hub = Hub.open(home.hub)
    records = {name: hub.record(name) for name in home.adapters}
    parents = [Parent(str(record.ref), record.digest, "merged") for record in records.values()]
    adapters = {name: hub.get(name) for name in home.adapters}
    found = auto_merge(adapters, AutoParameters(rank=4), parents=parents, portfolio=FEW)
    ranks = [(row.rows, row.score) for row in found.table if row.score is not None]
    assert ranks == sorted(ranks, reverse=True)
    order = [one.name for one in FEW]
    left = [row for row in found.table if row.rows == found.table[0].rows]
    near = [row.name for row in left if row.behind is not None and row.behind[0] <= 2 * row.behind[1]]
    first = min((name for name in near if name in order), key=order.index, default=None)
    assert found.best.name == (found.table[0].name if found.table[0].floor == "single" else first)
    floors = [row.floor for row in found.table if row.floor]
    assert sorted(floors) == ["nothing", "single", "single", "single", "task arithmetic"]
    (soup,) = [row for row in found.table if row.name == "soup"]
    assert soup.score is None
    assert "differ in rank" in str(soup.problem)
    # by hand: the likelihood of each task's rows, by the task's own adapter's
    trials = trials_of(adapters, 128)
    bench = Bench([replace(one, rows=one.rows.subsample(found.best.rows, 0)) for one in trials])
    shares = []
    for number, adapter in enumerate(adapters.values()):
        after, own = (bench.judge_on(one, number).likelihood for one in (found.adapter, adapter))
        shares.append(after / own)
    assert found.best.score == pytest.approx(sum(shares) / 3, rel=1e-5)
    for row in found.table:
        assert (row.behind is None) == (row.score is None)
        if row in left and row.behind is not None and row.score is not None:
            assert row.behind[0] == pytest.approx((left[0].score or 0) - row.score, abs=1e-9)
    for name in [row.name for row in found.table if row.method is not None and row.score is not None]:
        only = next((one for one in FEW if one.name == name), None)
        if only is None:
            continue
        chosen = auto_merge(adapters, AutoParameters(rank=4), parents=parents, portfolio=[only])
        if chosen.best.name == name:
            ref = hub.put(f"auto-{only.method}", chosen.adapter)
            assert merge_again(hub, ref).same, name
            with pytest.raises(MergeError, match="its method was found with all parents"):
                merge_without(hub, ref, ["two"])
            assert merge_without(hub, ref, ["two"], weights=[1.0, 1.0]).spec.lineage.parents[0].weight == 1.0


@pytest.mark.parametrize(("margin", "right", "wrong"), [(2.0, 9, 1), (0.5, 7, 3), (6.0, 3, 2)])
def test_a_temperature_makes_a_classifier_as_sure_as_it_is_right(margin: float, right: int, wrong: int) -> None:
    """Two classes, every row by the same margin: σ(margin / T) is the share of right ones."""
    logits = torch.tensor([[0.0, margin]]).expand(right + wrong, 2)
    targets = [1] * right + [0] * wrong
    share = right / (right + wrong)
    assert temperature_of(logits, targets) == pytest.approx(
        min(max(margin / math.log(share / (1 - share)), 0.25), 4.0), rel=1e-3
    )


def test_what_is_surer_of_the_same_answers_is_no_likelier() -> None:
    """The least loss of all temperatures, found on a grid; at three times the norm, the same probabilities."""
    generator = torch.Generator().manual_seed(3)
    logits, targets = torch.randn(40, 5, generator=generator), torch.randint(5, (40,), generator=generator)
    logits[torch.arange(40), targets] += 1
    grid = torch.linspace(0.25, 4.0, 4000, dtype=torch.float64)
    each = (logits.double()[None] / grid[:, None, None]).log_softmax(2)[:, torch.arange(40), targets]
    found = calibrated(logits, targets.tolist())
    assert found == pytest.approx(each[each.sum(1).argmax()].exp().tolist(), rel=1e-2)
    assert calibrated(3 * logits, targets.tolist()) == pytest.approx(found, rel=1e-2)
    assert 0.25 < temperature_of(logits, targets.tolist()) < 4 / 3


def test_a_verdict_is_of_the_calibrated_logits(home: Home) -> None:
    (trial,) = trials_of({"three": home.adapters["three"]}, 12, split="test")
    bench = Bench([trial])
    (verdict,) = bench.judge(None)
    logits = torch.stack([row.logits for row in bench.scored_on(None, 0) if row.logits is not None])
    assert verdict.rows == calibrated(logits, [int(each) for each in trial.rows.targets])
    plain = logits.softmax(1)[range(12), list(trial.rows.targets)]
    assert math.fsum(map(math.log, verdict.rows)) > float(plain.log().sum())


def test_how_far_each_is_behind_the_best() -> None:
    """Two tasks of two rows, by hand."""

    def verdicts(*rows: tuple[float, float]) -> tuple[Verdict, ...]:
        return tuple(Verdict("accuracy", 0.0, each) for each in rows)

    own = verdicts((0.5, 0.5), (1.0, 1.0))
    found = {
        "near": verdicts((0.5, 0.3), (0.9, 0.5)),  # shares 1.0, 0.6 and 0.9, 0.5: mean 0.75
        "far": verdicts((0.3, 0.4), (0.8, 0.4)),  # 0.1 to 0.2 less than the best in every row
        "best": verdicts((0.4, 0.5), (0.9, 0.5)),  # 0.8, 1.0 and 0.9, 0.5: mean 0.8
    }
    rows = judged([Entrant(name, "linear", None, None) for name in found], found, own, 2)
    assert [row.score for row in rows] == [pytest.approx(0.75), pytest.approx(0.65), pytest.approx(0.8)]
    assert {row.rows for row in rows} == {2}
    # gaps −0.2, 0.4 and 0, 0: mean 0.05, variances 0.18 and 0, √(0.18 / 2) / 2 = 0.15
    behind = [row.behind or () for row in rows]
    assert list(behind[0]) == pytest.approx([0.05, 0.15])
    # gaps 0.2, 0.2 and 0.1, 0.1: no spread
    assert list(behind[1]) == pytest.approx([0.15, 0.0], abs=1e-9)
    assert list(behind[2]) == [0.0, 0.0]
    assert [row.near for row in rows] == [True, False, True]
    assert [row.lost for row in rows] == [False, True, False]
    # 2.5 errors behind: told from the best, but not lost
    between = Judged("between", "linear", None, 0.7, behind=(0.5, 0.2))
    assert (between.near, between.lost) == (False, False)


class Track(Bench):
    """A bench that need not run anything: losses by adapter name and row; it counts what is asked for."""

    def __init__(self, trials: Sequence[Trial], losses: Mapping[str, Sequence[float]]) -> None:
        super().__init__(trials)
        self.losses = losses
        self.seen: dict[str, list[int]] = {name: [] for name in losses}

    def scored_on(self, candidate: Adapter | None, number: int, among: slice = ALL) -> list[Scored]:
        name = "nothing" if candidate is None else candidate.spec.lineage.parameters["name"]
        assert isinstance(name, str)
        self.seen[name] += range(among.start, among.stop)
        return [Scored(None, self.losses[name][row], 1) for row in range(among.start, among.stop)]


def test_those_that_are_clearly_behind_see_no_more_rows(home: Home) -> None:
    """Four entrants on a task of 40 rows: one is far behind, one a little, and one is the best on the first 16 only."""

    def named(name: str) -> Adapter:
        adapter = home.adapters["two"]
        return replace(adapter, spec=replace(adapter.spec, lineage=Lineage(parameters={"name": name})))

    task = task_of("two", home.adapters["two"])
    task = replace(task, kind="causal_lm", metric="loss", label=None, labels=(), target="answer")
    rows = Rows("train", tuple(map(str, range(40))), tuple(row % 2 for row in range(40)), ("no", "yes"))
    wave = [-0.1, 0.15] * 20
    losses = {
        "own": [0.1] * 40,
        "steady": [0.2 + each for each in wave],
        "early": [0.2] * 16 + [0.5] * 24,
        "far": [1.0] * 40,
        "nothing": [2.0] * 40,
    }
    track = Track([Trial("two", named("own"), task, rows)], losses)
    entrants = [Entrant(name, "linear", None, named(name)) for name in ("far", "steady", "early")]
    entrants += [Entrant("refused", "soup", None, None, "differ in rank"), Entrant("nothing", None, "nothing", None)]
    told: list[tuple[str, int, int]] = []
    table = {row.name: row for row in race(track, entrants, lambda *each: told.append(each))}
    assert looks(40) == [16, 20, 40]
    assert list(table) == ["far", "steady", "early", "refused", "nothing"]
    assert {name: row.rows for name, row in table.items()} == {
        "far": 16, "steady": 40, "early": 40, "refused": 0, "nothing": 16,
    }  # fmt: skip
    assert (table["refused"].score, table["refused"].problem) == (None, "differ in rank")
    assert track.seen == {name: list(range(40 if name in ("own", "steady", "early") else 16)) for name in losses}
    mean = math.fsum(math.exp(-0.2 - each) for each in wave) / 40
    assert table["steady"].score == pytest.approx(mean / math.exp(-0.1))
    assert table["steady"].behind == (0.0, 0.0)
    assert not table["early"].near
    assert ("on 16 rows of each task", 0, 4) in told
    assert ("on 40 rows of each task", 1, 2) in told


@pytest.mark.parametrize(
    ("most", "wanted"),
    [(1, [1]), (6, [6]), (16, [16]), (17, [16, 17]), (128, [16, 32, 64, 128]), (100, [16, 25, 50, 100])],
)
def test_every_look_is_about_twice_the_last(most: int, wanted: list[int]) -> None:
    assert looks(most) == wanted


def test_auto_tries_fisher_on_as_many_examples_as_it_has_rows(home: Home) -> None:
    """Its row, whether it wins or not, is the Fisher merge of so many examples; a record of it says how many."""
    adapters = dict(home.adapters)
    (row,) = [one for one in PORTFOLIO if one.method == "fisher"]
    found = auto_merge(adapters, rows=5, seed=2, portfolio=[row])
    (judged,) = [one for one in found.table if one.name == "fisher"]
    inputs = record_examples(list(adapters.values()), None, limit=5, seed=2, gradients=True)
    merged = merge(list(adapters.values()), "fisher", inputs=inputs)
    bench = Bench(trials_of(adapters, 5, seed=2))
    shares = []
    for number, adapter in enumerate(adapters.values()):
        after, own = (bench.judge_on(one, number).likelihood for one in (merged, adapter))
        shares.append(after / own)
    assert judged.score == pytest.approx(sum(shares) / 3, rel=1e-5)


def test_auto_that_keeps_fisher_is_made_again(home: Home) -> None:
    """On these two, and so few rows, it is the best; the record says how many examples it had looked at."""
    from graftory.adapter import Parent

    hub = Hub.open(home.hub)
    names = ["two", "pair"]
    records = [hub.record(name) for name in names]
    adapters = {name: hub.get(name) for name in names}
    parents = [Parent(str(record.ref), record.digest, "merged") for record in records]
    found = auto_merge(adapters, rows=3, parents=parents, portfolio=[Candidate("fisher", "fisher")])
    assert found.best.method == "fisher"
    assert found.adapter.spec.lineage.parameters["per_domain"] == 3
    assert merge_again(hub, hub.put("auto-fisher", found.adapter)).same


def test_an_adapter_may_be_called_like_a_method(home: Home) -> None:
    adapters = {"tsv": home.adapters["two"], "soup": home.adapters["three"]}
    found = auto_merge(adapters, rows=4, portfolio=[one for one in FEW if one.name == "tsv"])
    assert {row.name for row in found.table} == {"tsv", "tsv alone", "soup alone", "nothing (the bare base)"}
    methods = {row.name: row.method for row in found.table}
    assert (methods["tsv"], methods["tsv alone"]) == ("tsv", "linear")
    assert [name for name, _ in found.tasks] == ["tsv", "soup"]


def test_auto_takes_no_merge_that_is_worse_than_nothing(home: Home) -> None:
    two, three = home.adapters["two"], home.adapters["three"]
    worst = Candidate("against", "linear", -1.0)
    found = auto_merge({"two": two, "three": three}, portfolio=[worst])
    assert found.best.floor == "single"
    assert found.adapter.spec.lineage.parameters["weights"] in ([1.0, 0.0], [0.0, 1.0])
    with pytest.raises(MergeError, match="wanted 1 or more of each task"):
        auto_merge({"two": two}, rows=0)
    with pytest.raises(ConfigError, match="does not name the task"):
        auto_merge({"neck": bottleneck(1)})
