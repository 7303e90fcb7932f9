"""`hub train --search`: the space, the trials, what is kept, and a search that is killed."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from graftory import Hub
from graftory.adapter import Metric
from graftory.cli import cli
from graftory.config import BottleneckConfig, LoraConfig
from graftory.errors import ConfigError, CorruptAdapterError
from graftory.settings import TrainSettings
from graftory.training import Job, LoadedBase, evaluate, train
from graftory.training import search as searching
from graftory.training.search import Found, Trial, best_of, hold_out, search
from graftory.training.search_space import METHODS, SearchSpace
from tests.test_cli_train import TASK, make_base
from tests.training_samples import tiny_base, tiny_rows, tiny_task

SETTINGS = TrainSettings(max_steps=3, batch_size=4)
SPACE = SearchSpace(methods=("lora", "bottleneck"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return tiny_base("classification", tmp_path_factory.mktemp("base"))


def searched(loaded: LoadedBase, folder: Path, trials: int = 3, **changes: Any) -> Found:
    arguments: dict[str, Any] = {"space": SPACE, "settings": SETTINGS, **changes}
    rows, held = hold_out(tiny_rows("classification"), 0.25, 0)
    task = tiny_task("classification")
    return search(loaded, task, rows, held, trials=trials, folder=folder, **arguments)


@pytest.fixture(scope="module")
def found(loaded: LoadedBase, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Path]:
    folder = tmp_path_factory.mktemp("search")
    return searched(loaded, folder), folder


# --- the space -------------------------------------------------------------------------------------------------------


class First:
    """Suggests the first of everything, and remembers what it was asked for."""

    def __init__(self, method: str) -> None:
        self.method, self.asked = method, {}  # type: ignore[var-annotated]

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.asked[name] = tuple(choices)
        return self.method if name == "method" else choices[0]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.asked[name] = (low, high, log)
        return low


def test_the_choices_of_a_method_follow_from_its_configuration() -> None:
    space, trial = SearchSpace(seed=7), First("bottleneck")
    candidate = space.suggest(trial)
    assert candidate.config == BottleneckConfig(placement="houlsby", size=8, init_seed=7)
    assert trial.asked["method"] == METHODS
    assert trial.asked["bottleneck.placement"][0] == "houlsby"
    assert trial.asked["learning_rate"] == (5e-4, 2e-2, True)
    assert set(space.choices("lora")) == {"targets", "rank"}
    assert space.choices("ia3") == {}


def test_what_is_given_is_not_searched() -> None:
    space = SearchSpace(methods=("lora",), fixed={"rank": 3}, targets=("ffn",), learning_rate=0.01)
    trial = First("lora")
    candidate = space.suggest(trial)
    assert candidate.config == LoraConfig(rank=3, targets=("ffn",), init_seed=0)
    assert (candidate.learning_rate, list(trial.asked)) == (0.01, ["method"])
    with pytest.raises(ConfigError, match="got methods magic; wanted some of lora"):
        SearchSpace(methods=("magic",))
    with pytest.raises(ConfigError, match="rank can be fixed for one method only"):
        SearchSpace(fixed={"rank": 3})


def test_of_equal_trials_the_smallest_adapter_is_best() -> None:
    def trial(number: int, value: float | None, parameters: int) -> Trial:
        return Trial(number, "lora", {}, 0.1, value, parameters, "broken")

    trials = [trial(1, 0.5, 9), trial(2, 0.8, 9), trial(3, 0.8, 4), trial(4, None, 1), trial(5, 0.8, 4)]
    assert best_of(trials, "accuracy").number == 3
    assert best_of(trials, "loss").number == 1
    with pytest.raises(ConfigError, match="none of 1 trials came to a value; the last: broken"):
        best_of(trials[3:4], "accuracy")


def test_rows_are_held_out_once() -> None:
    rows = tiny_rows("classification", 20)
    kept, held = hold_out(rows, 0.25, 0)
    assert (len(kept), len(held)) == (15, 5)
    assert sorted([*kept.texts, *held.texts]) == sorted(rows.texts)
    assert (kept, held) == hold_out(rows, 0.25, 0)
    assert held != hold_out(rows, 0.25, 1)[1]
    with pytest.raises(ConfigError, match="got 1 training rows, wanted at least 2"):
        hold_out(tiny_rows("classification", 1), 0.25, 0)


# --- the trials ------------------------------------------------------------------------------------------------------


def test_the_best_trials_adapter_is_kept_as_training_it_alone_makes_it(
    loaded: LoadedBase, found: tuple[Found, Path]
) -> None:
    result, folder = found
    assert [trial.number for trial in result.trials] == [1, 2, 3]
    # the first trial is what `hub train` does by default
    first = result.trials[0]
    assert (first.method, first.options, first.learning_rate) == ("lora", {"targets": "qv", "rank": 8}, 2e-3)
    rows, held = hold_out(tiny_rows("classification"), 0.25, 0)
    values = []
    for trial in result.trials:
        candidate = SPACE.candidate(trial.method, trial.options, trial.learning_rate)
        settings = replace(SETTINGS, learning_rate=trial.learning_rate)
        adapter = train(loaded, tiny_task("classification"), rows, candidate.config, settings, name="alone")
        ((metric, _),) = evaluate(loaded, [Job("alone", adapter, None, tiny_task("classification"), held)])
        values.append(metric.value)
        assert trial.value == metric.value
        assert trial.parameters == sum(tensor.numel() for tensor in adapter.body_tensors().values())
        if trial.number == result.best:
            assert all(torch.equal(result.adapter.tensors[key], adapter.tensors[key]) for key in adapter.tensors)
            assert result.adapter.spec.config == adapter.spec.config
    assert values[result.best - 1] == max(values)
    assert {path.name for path in folder.iterdir()} == {"best.safetensors", "search.json", "trials.db", "work"}
    assert list((folder / "work").iterdir()) == []


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("moment", ["training", "saved", "told"])
def test_a_killed_search_goes_on_to_the_same_end(
    loaded: LoadedBase, found: tuple[Found, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    died: list[str] = []

    def die_once(*_: Any, **__: Any) -> Any:
        if len(died) < 2:
            died.append(moment)
            raise KilledError
        return None

    def before(function: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            die_once()
            return function(*arguments, **named)

        return run

    import optuna

    places: Mapping[str, tuple[Any, str]] = {
        "training": (searching, "train"),
        "saved": (optuna.Trial, "set_user_attr"),
        "told": (optuna.Study, "tell"),
    }
    owner, name = places[moment]
    monkeypatch.setattr(owner, name, before(getattr(owner, name)))
    for _ in range(2):
        with pytest.raises(KilledError):
            searched(loaded, tmp_path)
    result = searched(loaded, tmp_path)
    assert result.trials == found[0].trials
    assert result.best == found[0].best
    for key, tensor in found[0].adapter.tensors.items():
        assert torch.equal(result.adapter.tensors[key], tensor)


def test_a_search_can_be_made_longer_and_another_is_refused(
    loaded: LoadedBase, found: tuple[Found, Path], tmp_path: Path
) -> None:
    events: list[int] = []
    short = searched(loaded, tmp_path, 2, progress=lambda number, what: events.append(number))
    assert events == [1, 1, 2, 2]
    assert short.trials == found[0].trials[:2]
    longer = searched(loaded, tmp_path, 3, progress=lambda number, what: events.append(number))
    assert events[4:] == [3, 3]
    assert longer.trials == found[0].trials
    with pytest.raises(ConfigError, match=r"holds another search \(other settings\)"):
        searched(loaded, tmp_path, settings=replace(SETTINGS, max_steps=4))
    (tmp_path / "best.safetensors").unlink()
    with pytest.raises(CorruptAdapterError, match="search again in a new folder"):
        searched(loaded, tmp_path)


def test_a_candidate_that_does_not_fit_is_a_trial_without_a_value(
    loaded: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = searching.train  # type: ignore[attr-defined]

    def refuse_bottlenecks(*arguments: Any, **named: Any) -> Any:
        if arguments[3].method == "bottleneck":
            raise ConfigError("no place for it")
        return trained(*arguments, **named)

    def lost(_: Any, jobs: Sequence[Job], **__: Any) -> Any:
        return [(Metric("accuracy", float("nan"), "tiny", "train", 6),) for _ in jobs]

    monkeypatch.setattr(searching, "train", refuse_bottlenecks)
    result = searched(loaded, tmp_path / "a", 4)
    reasons = {trial.method: trial.reason for trial in result.trials}
    assert reasons == {"lora": "", "bottleneck": "no place for it"}
    assert result.adapter.spec.method == "lora"
    monkeypatch.setattr(searching, "evaluate", lost)
    with pytest.raises(ConfigError, match="none of 1 trials came to a value; the last: accuracy is nan"):
        searched(loaded, tmp_path / "b", 1)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "base", seed=0)
    Hub.create(tmp_path / "hub")

    def run(*arguments: str) -> Result:
        common = ("--registry", "hub", "train", str(TASK), "--base", "base", "--max-steps", "2")
        return CliRunner().invoke(cli, [*common, *arguments])

    return run


def test_the_command_keeps_the_best_and_records_the_search(call: Any, tmp_path: Path) -> None:
    done = call("--search", "3", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    search_note = said["search"]
    assert [trial["number"] for trial in search_note["trials"]] == [1, 2, 3]
    assert "trial 3 of 3: " in done.stderr
    record = Hub.open(tmp_path / "hub").record(said["ref"])
    assert record.spec.lineage.parameters["search"] == search_note
    best = search_note["trials"][search_note["best"] - 1]
    assert best["value"] == max(trial["value"] for trial in search_note["trials"])
    assert record.spec.method == best["method"]
    assert record.spec.lineage.parameters["learning_rate"] == best["learning_rate"]
    assert [metric.split for metric in record.spec.metrics] == ["test", "test"]
    again = call("--search", "3")
    assert again.exit_code == 0, again.output
    assert "trial 1 of" not in again.stderr  # nothing is trained again
    assert f"{search_note['best']} *" in again.stdout
    assert "kept trial" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--search", "2", "--rank", "4"), "--rank is of one method; name it with --method too"),
        (("--search", "2", "--checkpoints", "x"), "--checkpoints does not go with --search"),
        (("--search-methods", "lora"), "--search-methods and --search-dir go with --search N"),
        (("--search", "2", "--method", "lora", "--search-methods", "lora"), "give one of them"),
        (("--search", "2", "--search-methods", "lora,magic"), "got methods lora, magic; wanted some of"),
    ],
)
def test_what_does_not_go_together_is_refused(
    call: Any, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    done = call(*arguments)
    assert done.exit_code != 0
    assert reason in done.output
    assert not list(tmp_path.glob("*-search"))


def test_without_optuna_the_error_says_what_to_install(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(searching, "find_spec", lambda name: None)
    done = call("--search", "2")
    assert done.exit_code != 0
    assert "pip install 'graftory[search]'" in done.output
