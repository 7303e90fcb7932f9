"""Mixed evaluation and prediction, against one adapter at a time through `attach`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graftory.adapter import Adapter, TaskKind
from graftory.adapters import attach
from graftory.config import BottleneckConfig, LoraConfig
from graftory.data import Rows, TaskFile
from graftory.errors import ConfigError
from graftory.training import Job, LoadedBase, Query, TrainSettings, evaluate, measure, predict, train
from graftory.training.prediction import read
from tests.training_samples import tiny_base, tiny_rows, tiny_task

SETTINGS = TrainSettings(epochs=12, learning_rate=1e-2, batch_size=8)
Trained = tuple[TaskFile, Rows, Adapter]


def trained(
    loaded: LoadedBase, kind: TaskKind, name: str, labels: int, config: LoraConfig | BottleneckConfig
) -> Trained:
    task, rows = tiny_task(kind, name=name), tiny_rows(kind, 18, labels)
    return task, rows, train(loaded, task, rows, config, SETTINGS, name=name)


def alone(loaded: LoadedBase, text: str, adapter: Adapter) -> torch.Tensor:
    """Logits of one row, on its own, with one adapter."""
    adapted = attach(loaded.model, {"x": adapter})
    with torch.no_grad(), adapted.route("x"):
        logits: torch.Tensor = adapted(**loaded.tokenizer(text, return_tensors="pt")).logits[0]
    adapted.detach()
    return logits


def test_jobs_of_different_methods_and_heads_share_batches(tmp_path: Path) -> None:
    loaded = tiny_base("classification", tmp_path)
    first = trained(loaded, "classification", "first", 3, LoraConfig())
    second = trained(loaded, "classification", "second", 5, BottleneckConfig(size=8))
    third = trained(loaded, "regression", "third", 3, LoraConfig(rank=2))
    jobs = [Job(task.name, adapter, None, task, rows) for task, rows, adapter in (first, second, third)]
    results = evaluate(loaded, jobs, batch_size=7)
    for (task, rows, adapter), metrics in zip((first, second, third), results, strict=True):
        logits = [alone(loaded, str(text), adapter) for text in rows.texts]
        if task.kind == "regression":
            value = measure("pearson", rows.targets, [float(row[0]) for row in logits])
            loss = sum((float(row[0]) - y) ** 2 for row, y in zip(logits, map(float, rows.targets), strict=True)) / 18
        else:
            value = measure("accuracy", rows.targets, [int(row.argmax()) for row in logits])
            loss = -sum(float(row.log_softmax(0)[int(y)]) for row, y in zip(logits, rows.targets, strict=True)) / 18
        assert [metric.name for metric in metrics] == [task.metric, "loss"]
        assert [(metric.data, metric.split, metric.n) for metric in metrics] == [(task.name, "train", 18)] * 2
        assert metrics[0].value == pytest.approx(value, abs=1e-5)
        assert metrics[1].value == pytest.approx(loss, rel=1e-4)
        assert metrics[0].value > 0.6
    assert not any("adapter" in name for name in loaded.model.state_dict())


def test_a_job_may_use_another_adapters_head_and_the_bare_base(tmp_path: Path) -> None:
    loaded = tiny_base("classification", tmp_path)
    task, rows, adapter = trained(loaded, "classification", "first", 3, LoraConfig())
    body = Adapter(replace(adapter.spec, task=None), adapter.body_tensors())
    own, borrowed, bare = evaluate(
        loaded,
        [
            Job("own", adapter, None, task, rows),
            Job("b", body, adapter, task, rows),
            Job("c", None, adapter, task, rows),
        ],
    )
    assert borrowed == own
    assert bare[1].value > own[1].value
    with pytest.raises(ConfigError, match="no adapter with a head for classification was given; name one as head"):
        evaluate(loaded, [Job("none", body, None, task, rows)])


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq"])
def test_language_models_write_what_they_learned(tmp_path: Path, kind: TaskKind) -> None:
    loaded = tiny_base(kind, tmp_path)
    task, rows = tiny_task(kind, metric="exact_match"), tiny_rows(kind, 18)
    settings = replace(SETTINGS, epochs=60, learning_rate=2e-2)
    adapter = train(loaded, task, rows, LoraConfig(targets=("all",), rank=16), settings, name="tiny")
    mine, bare = evaluate(
        loaded,
        [Job("mine", adapter, None, task, rows), Job("bare", None, None, task, rows)],
        batch_size=7,
        max_new_tokens=4,
    )
    assert [metric.name for metric in mine] == ["exact_match", "loss"]
    assert mine[0].value > 0.8
    assert bare[0].value == 0.0
    assert mine[1].value < bare[1].value
    queries = [Query(text, each, task=rows.info(task)) for text in rows.texts for each in (adapter, None)]
    together = predict(loaded, queries, batch_size=7, max_new_tokens=4)
    singly = [predict(loaded, [query], max_new_tokens=4)[0] for query in queries[:6]]
    assert list(together[:6]) == singly
    share = sum(each.text == target for each, target in zip(together[::2], rows.targets, strict=True)) / 18
    assert share == pytest.approx(mine[0].value)


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq"])
def test_words_are_scored_against_each_other_in_mixed_batches(tmp_path: Path, kind: TaskKind) -> None:
    """The likeliest of the words, end token and all, by plain forward passes of one row and one word."""
    loaded = tiny_base(kind, tmp_path)
    words = tuple(sorted({str(target) for target in tiny_rows(kind).targets}))
    task, rows = tiny_task(kind, metric="accuracy", labels=words), tiny_rows(kind, 18)
    adapter = train(loaded, task, rows, LoraConfig(targets=("all",)), replace(SETTINGS, epochs=8), name="tiny")
    jobs = [Job("mine", adapter, None, task, rows), Job("bare", None, None, replace(task, metric="likelihood"), rows)]
    mine, bare = evaluate(loaded, jobs, batch_size=7)
    assert [metric.name for metric in (*mine, *bare)] == ["accuracy", "loss", "likelihood", "loss"]
    assert bare[0].value == pytest.approx(math.exp(-bare[1].value))
    adapted = attach(loaded.model, {"x": adapter})
    right = 0
    for text, target in zip(rows.texts, rows.targets, strict=True):
        totals = []
        for word in words:
            with torch.no_grad(), adapted.route("x"):
                totals.append(log_probability(loaded, adapted, str(text), word, kind))
        right += words[totals.index(max(totals))] == target
    adapted.detach()
    assert mine[0].value == pytest.approx(right / 18)
    assert mine[0].value > 0.5


def log_probability(loaded: LoadedBase, adapted: Any, text: str, word: str, kind: TaskKind) -> float:
    """log p(word, end | text), token by token."""
    ids = loaded.tokenizer(text)["input_ids"]
    answer = loaded.tokenizer(word, add_special_tokens=False)["input_ids"] + [loaded.tokenizer.eos_token_id]
    if kind == "seq2seq":
        start = loaded.model.config.decoder_start_token_id
        logits = adapted(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[start, *answer[:-1]]])).logits
    else:
        logits = adapted(input_ids=torch.tensor([ids + answer])).logits[:, len(ids) - 1 : -1]
    log = logits[0].double().log_softmax(-1)
    return float(log[range(len(answer)), answer].sum())


def test_a_language_model_has_to_stop_where_the_answer_does(tmp_path: Path) -> None:
    """By default more tokens than the longest right answer are written, so that one who goes on is found out."""
    loaded = tiny_base("causal_lm", tmp_path)
    task, rows = tiny_task("causal_lm", metric="exact_match"), tiny_rows("causal_lm", 18)
    settings = replace(SETTINGS, epochs=30, learning_rate=2e-2)
    longer = Rows("train", rows.texts, tuple(f"{target} w39 w39" for target in rows.targets))
    adapter = train(loaded, task, longer, LoraConfig(targets=("all",), rank=16), settings, name="tiny")
    own, cut = evaluate(loaded, [Job("own", adapter, None, task, longer), Job("cut", adapter, None, task, rows)])
    assert own[0].value > 0.8
    assert cut[0].value == 0.0


def test_plain_text_is_read_with_each_its_adapter(tmp_path: Path) -> None:
    loaded = tiny_base("causal_lm", tmp_path)
    task, rows = tiny_task("causal_lm"), tiny_rows("causal_lm", 18)
    adapter = train(loaded, task, rows, LoraConfig(targets=("all",)), SETTINGS, name="tiny")
    texts = ("w1 w2 w3 w4", "w5 w6", "w7 w8 w9 w1 w2 w3", "w1")
    scored = read(loaded, texts, (adapter, None, adapter, None), max_length=5, batch_size=3)
    assert [row.targets for row in scored] == [3, 1, 4, 0]
    adapted = attach(loaded.model, {"x": adapter})
    for text, row, name in zip(texts[:3], scored, ("x", None, "x"), strict=False):
        ids = torch.tensor([loaded.tokenizer(text)["input_ids"][:5]])
        with torch.no_grad(), adapted.route([name]):
            mean = float(adapted(input_ids=ids, labels=ids).loss)
        assert row.loss / row.targets == pytest.approx(mean, rel=1e-4)
    adapted.detach()
    with pytest.raises(ConfigError, match="wanted a causal language model"):
        read(tiny_base("seq2seq", tmp_path / "t5"), ["w1 w2"], [None])


def test_predictions_carry_labels_probabilities_and_values(tmp_path: Path) -> None:
    loaded = tiny_base("classification", tmp_path)
    _, rows, classifier = trained(loaded, "classification", "first", 3, LoraConfig())
    _, _, regressor = trained(loaded, "regression", "third", 3, LoraConfig(rank=2))
    queries = [Query(text, adapter) for text in rows.texts[:4] for adapter in (classifier, regressor)]
    predictions = predict(loaded, queries, batch_size=3)
    for text, label, number in zip(rows.texts, predictions[::2], predictions[1::2], strict=False):
        logits = alone(loaded, str(text), classifier)
        assert label.probabilities is not None
        assert list(label.probabilities) == list(rows.labels)
        assert list(label.probabilities.values()) == pytest.approx(logits.softmax(0).tolist(), abs=1e-5)
        assert label.label == rows.labels[int(logits.argmax())]
        assert number.value == pytest.approx(float(alone(loaded, str(text), regressor)[0]), abs=1e-4)
        assert (number.label, label.value) == (None, None)


def test_a_query_needs_a_task(tmp_path: Path) -> None:
    loaded = tiny_base("causal_lm", tmp_path)
    with pytest.raises(ConfigError, match="does not say what task it is for; give the task"):
        predict(loaded, [Query("w0", None)])
