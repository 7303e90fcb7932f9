"""Measure adapters on tasks: all jobs at once, in batches whose rows use different adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graftory.adapter import Adapter, Metric
from graftory.data import Rows, TaskFile
from graftory.training.base import LoadedBase
from graftory.training.metrics import measure
from graftory.training.predict import Query, Scored, generate, score


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

    def queries(self) -> list[Query]:
        """The rows, each with its adapter and head."""
        info = self.rows.info(self.task)
        pairs = zip(self.rows.texts, self.rows.targets, strict=True)
        return [Query(text, self.adapter, self.head, info, target) for text, target in pairs]


def evaluate(
    loaded: LoadedBase, jobs: Sequence[Job], *, batch_size: int = 32, max_new_tokens: int = 64
) -> tuple[tuple[Metric, ...], ...]:
    """Measure every job: its task's metric, then the loss (mean over rows; for language models over target tokens).

    Rows of all jobs are mixed in batches of like length, each with its own adapter and head.

    Raises:
        ConfigError: If a job needs a head and has none.
        BaseMismatchError: If an adapter belongs to another base.
    """
    queries = [job.queries() for job in jobs]
    scored = _split(score(loaded, [query for part in queries for query in part], batch_size=batch_size), queries)
    writing = [part if job.task.metric == "exact_match" else [] for job, part in zip(jobs, queries, strict=True)]
    flat = [query for part in writing for query in part]
    written: list[str] = []
    if flat:
        written = generate(loaded, flat, batch_size=batch_size, max_new_tokens=max_new_tokens)
    texts = _split(written, writing)
    return tuple(_metrics(job, *outputs) for job, *outputs in zip(jobs, scored, texts, strict=True))


def _metrics(job: Job, scored: Sequence[Scored], texts: Sequence[str]) -> tuple[Metric, ...]:
    name = job.task.metric
    loss = sum(row.loss for row in scored) / max(1, sum(row.targets for row in scored))
    values = {"loss": loss}
    if name != "loss":
        outputs = list(texts) if name == "exact_match" else [_output(job, row) for row in scored]
        values = {name: measure(name, job.rows.targets, outputs), "loss": loss}
    return tuple(Metric(key, value, job.task.name, job.rows.split, len(job.rows)) for key, value in values.items())


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
