"""Merges chosen on rows: what is judged by, who is judged on how many rows, and what is kept."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from graftory.adapter import Adapter, Lineage, Parent
from graftory.compose import merge, merge_again, merge_without
from graftory.compose.merge.judging import ALL, Bench, Trial, Verdict, task_of, trials_of, unseen_rows
from graftory.compose.merge.temperature import calibrated, temperature_of
from graftory.compose.merge.tuning import PORTFOLIO, AutoParameters, Candidate, auto_merge
from graftory.compose.merge.tuning.floor import Beside, beside_alone
from graftory.compose.merge.tuning.race import Entrant, Judged, judged, looks, race
from graftory.compose.merge.tuning.seen import Seen
from graftory.compose.record import record_examples
from graftory.data import Rows, load_rows, load_task
from graftory.errors import ConfigError, MergeError
from graftory.hub import Hub
from graftory.progress import silent
from graftory.schema import encode
from graftory.training import Job, evaluate
from graftory.training.prediction import Scored
from tests.merge_home import Home, make_home
from tests.test_compose_merge import bottleneck, lora


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_home(tmp_path_factory.mktemp("auto"))


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
    """A bench that need not run anything: what becomes of rows by adapter name; it counts what is asked for."""

    def __init__(self, trials: Sequence[Trial], scored: Mapping[str, Sequence[Scored]]) -> None:
        super().__init__(trials)
        self.scored = scored
        self.seen: dict[str, list[int]] = {name: [] for name in scored}

    def scored_on(self, candidate: Adapter | None, number: int, among: slice = ALL) -> list[Scored]:
        name = "nothing" if candidate is None else candidate.spec.lineage.parameters["name"]
        assert isinstance(name, str)
        self.seen[name] += range(among.start, among.stop)
        return list(self.scored[name][among])


def named(home: Home, name: str) -> Adapter:
    """An adapter that a track knows."""
    adapter = home.adapters["two"]
    return replace(adapter, spec=replace(adapter.spec, lineage=Lineage(parameters={"name": name})))


def trial_of(home: Home, rows: int, *, labels: bool) -> Trial:
    """So many rows for the adapter `own`: of two labels, or of a language model."""
    task = task_of("two", home.adapters["two"])
    if not labels:
        task = replace(task, kind="causal_lm", metric="loss", label=None, labels=(), target="answer")
    texts, targets = tuple(map(str, range(rows))), tuple(row % 2 for row in range(rows))
    return Trial("two", named(home, "own"), task, Rows("train", texts, targets, ("no", "yes")))


def test_those_that_are_clearly_behind_see_no_more_rows(home: Home) -> None:
    """Four entrants on a task of 40 rows: one is far behind, one a little, and one is the best on the first 16 only."""

    wave = [-0.1, 0.15] * 20
    losses = {
        "own": [0.1] * 40,
        "steady": [0.2 + each for each in wave],
        "early": [0.2] * 16 + [0.5] * 24,
        "far": [1.0] * 40,
        "nothing": [2.0] * 40,
    }
    scored = {name: [Scored(None, loss, 1) for loss in each] for name, each in losses.items()}
    track = Track([trial_of(home, 40, labels=False)], scored)
    entrants = [Entrant(name, "linear", None, named(home, name)) for name in ("far", "steady", "early")]
    entrants += [Entrant("refused", "soup", None, None, "differ in rank"), Entrant("nothing", None, "nothing", None)]
    told: list[tuple[str, int, int]] = []
    table = {row.name: row for row in race(Seen(track), entrants, 40, lambda *each: told.append(each))}
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


def test_what_may_be_better_alone_sees_more_rows(home: Home) -> None:
    """A merge that is wrong on every 16th row, beside adapters alone: behind it, ahead, and as it is."""
    wrong = {
        "own": set[int](),
        "merge": set(range(15, 512, 16)),
        "behind": {row for row in range(512) if row % 16 < 2},
        "ahead": {1},
        "like": set(range(15, 512, 16)),
    }
    yes, no = Scored(torch.tensor([0.0, 1.0])), Scored(torch.tensor([1.0, 0.0]))
    scored = {name: [yes if row % 2 != (row in rows) else no for row in range(512)] for name, rows in wrong.items()}
    track = Track([trial_of(home, 512, labels=True)], scored)
    told: list[tuple[str, int, int]] = []
    chosen, *singles = (Entrant(name, "linear", None, named(home, name)) for name in list(wrong)[1:])
    found = beside_alone(Seen(track), chosen, singles, 8, lambda *each: told.append(each))
    assert [(each.name, each.rows) for each in found] == [("ahead", 128), ("like", 64), ("behind", 256)]
    # of 128 rows eight are won and one is lost: mean 7/128, variance (9 − 7²/128) / 127
    assert found[0].ahead == pytest.approx((7 / 128, math.sqrt((9 - 49 / 128) / 127 / 128)))
    assert found[1].ahead == (0.0, 0.0)
    # of 256 rows 16 are won and 32 are lost
    assert found[2].ahead == pytest.approx((-16 / 256, math.sqrt((48 - 1) / 255 / 256)))
    assert [each.better for each in found] == [True, False, False]
    assert {name: len(rows) for name, rows in track.seen.items()} == {
        "own": 256, "merge": 256, "behind": 256, "ahead": 128, "like": 64,
    }  # fmt: skip
    assert told[-1] == ("beside each alone, on 256 rows of each task", 0, 1)
    unlabelled = Track([trial_of(home, 512, labels=False)], scored)
    assert beside_alone(Seen(unlabelled), chosen, singles, 8, silent) == ()
    assert not any(unlabelled.seen.values())


@pytest.mark.parametrize(
    ("ahead", "settled", "better"),
    [
        ((-0.03, 0.019), True, False),  # at most 0.8 points ahead
        ((-0.03, 0.021), False, False),
        ((0.004, 0.002), True, False),  # surely ahead, and surely by less than a point
        ((0.004, 0.02), False, True),
        ((0.05, 0.02), True, True),
    ],
)
def test_when_more_rows_would_hardly_change_it(ahead: tuple[float, float], settled: bool, better: bool) -> None:
    beside = Beside("alone", ahead, 128)
    assert (beside.settled, beside.better) == (settled, better)


def test_auto_keeps_the_adapter_alone_that_gets_more_right(home: Home) -> None:
    """By likelihood, on 3 rows, the Fisher merge comes first; on 24 rows an adapter alone is right more often."""
    adapters = {name: home.adapters[name] for name in ("two", "pair")}
    found = auto_merge(adapters, AutoParameters(), rows=3, portfolio=[Candidate("fisher", "fisher")])
    assert (found.first.name, found.best.name) == ("fisher", "two alone")
    inputs = record_examples(list(adapters.values()), None, limit=3, gradients=True)
    merged = merge(list(adapters.values()), "fisher", inputs=inputs)
    bench = Bench(trials_of(adapters, 24))  # all rows that there are; the own adapters are right on all
    right = {
        name: math.fsum(verdict.value for verdict in bench.judge(one)) / 2
        for name, one in {"merged": merged, **adapters}.items()
    }
    for each in found.beside:
        assert each.rows == 24
        assert each.ahead[0] == pytest.approx(right[each.name.removesuffix(" alone")] - right["merged"])
    assert [each.name for each in found.beside] == ["two alone", "pair alone"]
    told = found.adapter.spec.lineage.parameters
    assert told["weights"] == [1.0, 0.0]
    assert isinstance(told["auto"], dict)
    assert (told["auto"]["first"], told["auto"]["chosen"]) == ("fisher", "two alone")
    assert told["auto"]["alone"] == encode(found.beside)


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


def test_auto_that_keeps_fisher_is_made_again(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """On these two, and so few rows, it comes first; the record says how many examples it had looked at.

    These adapters are random: alone they get more right than any merge. So that is not asked for.
    """
    monkeypatch.setattr(sys.modules["graftory.compose.merge.tuning.auto"], "beside_alone", lambda *_: ())
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
