"""Losses reach the integrations of transformers' `Trainer`, each step of a run as a run of its own."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from graftory.continual.files import read_json
from graftory.continual.sequence import TaskSequence
from graftory.continual.state import RunFolder
from graftory.errors import ConfigError
from graftory.schema import decode
from graftory.settings import TrainSettings
from graftory.training.learning import training_arguments
from graftory.training.reporting import Reporting, check_reporting
from tests.continual_samples import make_place, short_run

_VARIABLE = "TENSORBOARD_LOGGING_DIR"


def test_what_is_asked_for_reaches_the_trainer(tmp_path: Path) -> None:
    made = training_arguments(TrainSettings(), tmp_path, keep=False, reporting=Reporting(("wandb",), "a b"))
    assert made.report_to == ["wandb"]
    assert made.run_name == "a b"
    assert training_arguments(TrainSettings(), tmp_path, keep=False).report_to == []


def test_what_is_not_installed_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="report_to: 'chalkboard' is not installed"):
        check_reporting(["chalkboard"])
    place = make_place(tmp_path)
    with pytest.raises(ConfigError, match="chalkboard"):
        short_run(place, tmp_path / "run", "seq", ["colours"], report_to=("chalkboard",))
    assert not (tmp_path / "run" / "run" / "sequence.json").exists()


def test_every_step_is_a_run_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of TensorBoard's callback stands one that writes down what it is told."""
    told: list[tuple[str, str, list[str]]] = []

    class Listener(TrainerCallback):
        def __init__(self) -> None:
            self.folder = os.environ[_VARIABLE]

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            told.append((args.run_name, self.folder, sorted(logs)))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Listener)
    monkeypatch.setattr("graftory.training.reporting.get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setenv(_VARIABLE, "elsewhere")
    place = make_place(tmp_path)
    _, _, folder = short_run(place, tmp_path / "run", "ewc", ["colours", "animals"], report_to=("tensorboard",))
    assert os.environ[_VARIABLE] == "elsewhere"
    names = dict.fromkeys((run, logs) for run, logs, _ in told)
    assert list(names) == [
        ("run ewc 1 colours", str(folder.logs(1, "colours"))),
        ("run ewc 2 animals", str(folder.logs(2, "animals"))),
    ]
    second = [keys for run, _, keys in told if run == "run ewc 2 animals"]
    assert {"loss", "loss_ewc", "loss_task", "learning_rate", "grad_norm"} <= set(second[0])


def test_it_may_change_from_start_to_start(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    _, _, folder = short_run(place, tmp_path / "run", "seq", ["colours"])
    again = RunFolder(folder.root)
    before = decode(TaskSequence, read_json(folder.root / "sequence.json"), "sequence.json")
    again.open(replace(before, report_to=("tensorboard",)))
    with pytest.raises(ConfigError, match="other max_drop"):
        again.open(replace(before, max_drop=0.1))


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_itself(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    _, _, folder = short_run(place, tmp_path / "run", "seq", ["colours"], report_to=("tensorboard",))
    [events] = folder.logs(1, "colours").glob("events.out.tfevents.*")
    assert b"train/loss" in events.read_bytes()
