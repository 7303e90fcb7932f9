"""A few steps on the real sample models: the YAML kinds are all real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from graftory.config import BottleneckConfig, LoraConfig
from graftory.data import load_rows, load_task
from graftory.training import Job, Query, TrainSettings, evaluate, load_base, predict, train

pytestmark = pytest.mark.real


def task_file(folder: Path, text: str) -> str:
    path = folder / "task.yaml"
    path.write_text(text)
    return str(path)


def test_minilm_learns_trec_from_few_rows_with_either_method() -> None:
    loaded, task = load_base("wheel:minilm", "classification"), load_task("wheel:trec")
    rows, test = load_rows(task, "train", limit=240), load_rows(task, "test", limit=100)
    settings = TrainSettings(epochs=4, learning_rate=3e-3, batch_size=8)
    lora = train(loaded, task, rows, LoraConfig(), settings, name="lora")
    bottleneck = train(loaded, task, rows, BottleneckConfig(), settings, name="bottleneck")
    results = evaluate(loaded, [Job(each.spec.method, each, None, task, test) for each in (lora, bottleneck)])
    # six classes, the largest has 28 % of the test rows
    assert min(metrics[0].value for metrics in results) > 0.6
    (prediction,) = predict(loaded, [Query("How far is the moon ?", lora)])
    assert prediction.label == "number"


CAUSAL = """
name: trec-words
kind: causal_lm
data: {sample: wheel:trec}
target: label
template: "Question: {text}\\nType:"
max_length: 48
"""


def test_smollm2_learns_to_answer(tmp_path: Path) -> None:
    loaded, task = load_base("wheel:smollm2", "causal_lm"), load_task(task_file(tmp_path, CAUSAL))
    rows = load_rows(task, "train", limit=16)
    settings = TrainSettings(max_steps=4, batch_size=4, learning_rate=2e-3, warmup=0.0)
    adapter = train(loaded, task, rows, LoraConfig(), settings, name="words")
    before, after = evaluate(loaded, [Job("bare", None, None, task, rows), Job("words", adapter, None, task, rows)])
    assert after[0].name == "loss"
    assert after[0].value < 0.7 * before[0].value


def test_t5_learns_to_answer(tmp_path: Path) -> None:
    task = load_task(task_file(tmp_path, CAUSAL.replace("causal_lm", "seq2seq")))
    loaded, rows = load_base("wheel:t5", "seq2seq"), load_rows(task, "train", limit=32)
    settings = TrainSettings(max_steps=8, batch_size=8, learning_rate=5e-3, warmup=0.0)
    adapter = train(loaded, task, rows, LoraConfig(), settings, name="words")
    before, after = evaluate(loaded, [Job("bare", None, None, task, rows), Job("words", adapter, None, task, rows)])
    assert after[0].value < 0.7 * before[0].value
    exact = replace(task, metric="exact_match")
    (metrics,) = evaluate(loaded, [Job("words", adapter, None, exact, rows)], max_new_tokens=4)
    assert metrics[0].name == "exact_match"
