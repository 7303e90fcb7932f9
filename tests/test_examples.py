"""The files in examples/: each is read, and those that need no network are run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from graftory.continual import load_sequence
from graftory.data import load_rows, load_task

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["tickets.yaml", "rotten-tomatoes.yaml"])
def test_tasks_are_read(name: str) -> None:
    assert load_task(str(EXAMPLES / name)).kind == "classification"


def test_tickets_has_rows_of_every_label_in_both_splits() -> None:
    task = load_task(str(EXAMPLES / "tickets.yaml"))
    train, test = load_rows(task, "train"), load_rows(task, "test")
    assert len(train) + len(test) == 36
    assert set(train.targets) == set(test.targets) == {0, 1, 2}
    assert not set(train.texts) & set(test.texts)


def test_sequence_is_read_with_all_its_tasks() -> None:
    sequence = load_sequence(EXAMPLES / "sequence.yaml")
    assert [load_task(source).name for source in sequence.tasks] == ["trec", "sms", "tickets"]


def test_the_sequence_of_words_is_read_with_its_probe() -> None:
    sequence = load_sequence(EXAMPLES / "sequence-words.yaml")
    tasks = [load_task(source) for source in sequence.tasks]
    assert [(task.kind, task.metric) for task in tasks] == [("causal_lm", "exact_match"), ("causal_lm", "accuracy")]
    assert tasks[0].labels[:2] == ("description", "entity")
    assert sequence.probe is not None
    assert sequence.probe.text == "wheel:valence-nyt"


def test_every_yaml_is_tested_here() -> None:
    tasks = {"tickets.yaml", "rotten-tomatoes.yaml", "words-trec.yaml", "words-movies.yaml"}
    assert {path.name for path in EXAMPLES.glob("*.yaml")} == {*tasks, "sequence.yaml", "sequence-words.yaml"}


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_scripts_run(script: str) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "extracted unchanged: True" in done.stdout
