"""Measure adapters on tasks: all jobs at once, in batches whose rows use different adapters.

A language model is measured by what it writes (exact match), by which of the label words it gives the highest
probability, with the end token behind it (accuracy), or by the probability of the right one (likelihood, loss).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftory.adapter import Adapter, Metric
from graftory.data import TEXT_KINDS, Rows, TaskFile
from graftory.training.base import LoadedBase
from graftory.training.metrics import ROW_MEANS, measure
from graftory.training.mixture import Mixture
from graftory.training.prediction import Query, Scored, generate, score

_LEEWAY = 8
"""Tokens that a language model may write beyond the longest right answer: it has to show that it stops there."""


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter to measure on the rows of one task."""

    name: str
    adapter: Adapter | None
    """None: the bare base."""
    head: Adapter | None
    """Adapter whose head is used; None: the adapter's own."""
    task: TaskFile
    rows: Rows
    mixture: Mixture | None = None
    """Adapters that rows are run through in place of one."""

    def queries(self) -> list[Query]:
        """The rows, each with its adapter and head."""
        info = self.rows.info(self.task)
        pairs = zip(self.rows.texts, self.rows.targets, strict=True)
        return [Query(text, self.adapter, self.head, info, target, self.mixture) for text, target in pairs]


@dataclass(frozen=True, slots=True)
class Measured:
    """What became of a job."""

    metrics: tuple[Metric, ...]
    """The task's, then the loss: the mean over rows, of language models over target tokens."""
    outputs: tuple[int | float | str, ...]
    """What was said of each row: the number of a label, a number or a text; nothing where only losses count."""

    def right(self, targets: Sequence[int | float | str]) -> tuple[bool, ...]:
        """Whether each row is right; nothing where the metric is no share of the rows."""
        is_right = ROW_MEANS.get(self.metrics[0].name)
        return () if is_right is None else tuple(map(is_right, targets, self.outputs))


def evaluate(
    loaded: LoadedBase, jobs: Sequence[Job], *, batch_size: int = 32, max_new_tokens: int | None = None
) -> tuple[tuple[Metric, ...], ...]:
    """The metrics of every job; see `evaluate_rows`."""
    found = evaluate_rows(loaded, jobs, batch_size=batch_size, max_new_tokens=max_new_tokens)
    return tuple(each.metrics for each in found)


def evaluate_rows(
    loaded: LoadedBase, jobs: Sequence[Job], *, batch_size: int = 32, max_new_tokens: int | None = None
) -> tuple[Measured, ...]:
    """Measure every job, and tell what was said of each of its rows.

    Rows of all jobs are mixed in batches of like length, each with its own adapter and head.

    Args:
        loaded: The base model.
        jobs: What to measure.
        batch_size: Rows at a time.
        max_new_tokens: The most tokens that are written; by default some more than the longest right answer has.

    Raises:
        ConfigError: If a job needs a head and has none.
        BaseMismatchError: If an adapter belongs to another base.
    """
    queries = [job.queries() for job in jobs]
    scored = _split(score(loaded, [query for part in queries for query in part], batch_size=batch_size), queries)
    written = _written(loaded, jobs, queries, batch_size, max_new_tokens)
    chosen = _chosen(loaded, jobs, queries, batch_size)
    return tuple(_measured(job, *outputs) for job, *outputs in zip(jobs, scored, written, chosen, strict=True))


def _written(
    loaded: LoadedBase,
    jobs: Sequence[Job],
    queries: Sequence[Sequence[Query]],
    batch_size: int,
    max_new_tokens: int | None,
) -> list[Sequence[str]]:
    """What language models write, for every job that is measured by it; of the others nothing."""
    parts = [part if job.task.metric == "exact_match" else [] for job, part in zip(jobs, queries, strict=True)]
    flat = [query for part in parts for query in part]
    if not flat:
        return [()] * len(jobs)
    if max_new_tokens is None:
        answers = {str(query.target) for query in flat}
        lengths = [len(loaded.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) for answer in answers]
        max_new_tokens = max(lengths) + _LEEWAY
    return _split(generate(loaded, flat, batch_size=batch_size, max_new_tokens=max_new_tokens), parts)


def _chosen(
    loaded: LoadedBase, jobs: Sequence[Job], queries: Sequence[Sequence[Query]], batch_size: int
) -> list[Sequence[str]]:
    """The likeliest of the label words, argmax_w p(w, end | prompt), for every job of text that is measured by it."""
    words = [job.task.labels if job.task.kind in TEXT_KINDS and job.task.metric == "accuracy" else () for job in jobs]
    parts = [
        [replace(query, target=word) for query in part for word in own]
        for own, part in zip(words, queries, strict=True)
    ]
    flat = [query for part in parts for query in part]
    if not flat:
        return [()] * len(jobs)
    scored = _split(score(loaded, flat, batch_size=batch_size), parts)
    return [_likeliest(own, [row.loss for row in part]) for own, part in zip(words, scored, strict=True)]


def _likeliest(words: Sequence[str], losses: Sequence[float]) -> list[str]:
    """The word with the lowest loss, row by row; the losses of a row stand beside each other."""
    size = max(1, len(words))
    rows = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [words[min(range(size), key=row.__getitem__)] for row in rows]


def _measured(job: Job, scored: Sequence[Scored], written: Sequence[str], chosen: Sequence[str]) -> Measured:
    name = job.task.metric
    loss = sum(row.loss for row in scored) / max(1, sum(row.targets for row in scored))
    values, outputs = {"loss": loss}, tuple[int | float | str, ...]()
    if name == "likelihood":
        values = {name: math.exp(-loss), "loss": loss}
    elif name != "loss":
        outputs = tuple(written or chosen or [_output(job, row) for row in scored])
        values = {name: measure(name, job.rows.targets, outputs), "loss": loss}
    metrics = (Metric(key, value, job.task.name, job.rows.split, len(job.rows)) for key, value in values.items())
    return Measured(tuple(metrics), outputs)


def _output(job: Job, row: Scored) -> float:
    assert row.logits is not None
    return int(row.logits.argmax()) if job.task.kind == "classification" else float(row.logits[0])


def _split(flat: Sequence[Any], parts: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """Cut a flat list into pieces as long as the parts."""
    pieces, start = [], 0
    for part in parts:
        pieces.append(flat[start : start + len(part)])
        start += len(part)
    return pieces
