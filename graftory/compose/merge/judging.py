"""Holding adapters against rows of the tasks that others were trained on, each task read with its own head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from graftory.adapter import TASK_SOURCE, Adapter, TaskKind
from graftory.compose.merge.temperature import calibrated
from graftory.data import Rows, TaskFile, load_rows, load_task
from graftory.errors import ConfigError, MergeError
from graftory.training import LoadedBase, load_base
from graftory.training.metrics import LOWER_IS_BETTER, METRICS, measure
from graftory.training.prediction import HEADED, Query, Scored, score

ENOUGH = 16
"""So many rows that an adapter has not been trained on tell more of it than many that it has."""
ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Trial:
    """Rows of the task that an adapter was trained on.

    Attributes:
        name: The adapter.
        adapter: Its head is what reads the rows, whatever adapter is judged.
        task: The task.
        rows: Some of its rows.
    """

    name: str
    adapter: Adapter
    task: TaskFile
    rows: Rows

    @property
    def metric(self) -> str:
        """The task's metric; `loss` where it cannot be told from one forward pass."""
        return self.task.metric if self.task.metric in METRICS and self.task.kind in HEADED else "loss"

    @property
    def has_labels(self) -> bool:
        """Whether an answer is either right or wrong."""
        return self.task.kind == "classification"

    def queries(self, candidate: Adapter | None, among: slice = ALL) -> list[Query]:
        """Some of the rows, with another adapter and the own head."""
        info = self.rows.info(self.task)
        head = self.adapter if self.adapter.head_tensors() else None
        pairs = zip(self.rows.texts[among], self.rows.targets[among], strict=True)
        return [Query(text, candidate, head, info, target) for text, target in pairs]

    def verdict(self, scored: Sequence[Scored]) -> Verdict:
        """Of what became of the first rows."""
        if self.metric == "loss":
            loss = sum(row.loss for row in scored) / max(1, sum(row.targets for row in scored))
            return Verdict("loss", loss, self._likelihoods(scored))
        outputs = [
            int(row.logits.argmax()) if self.has_labels else float(row.logits[0])
            for row in scored
            if row.logits is not None
        ]
        value = measure(self.metric, self.rows.targets[: len(scored)], outputs)
        return Verdict(self.metric, value, self._likelihoods(scored))

    def answers(self, scored: Sequence[Scored]) -> tuple[float, ...]:
        """How good the answer to each of the first rows is: 1 where it is right and 0 where it is not, where a task has
        labels; else the likelihood of the target."""
        if not self.has_labels:
            return self._likelihoods(scored)
        labels = [int(row.logits.argmax()) for row in scored if row.logits is not None]
        return tuple(float(label == target) for label, target in zip(labels, self.rows.targets, strict=False))

    def _likelihoods(self, scored: Sequence[Scored]) -> tuple[float, ...]:
        if self.has_labels:
            logits = torch.stack([row.logits for row in scored if row.logits is not None])
            return calibrated(logits, [int(target) for target in self.rows.targets[: len(scored)]])
        return tuple(math.exp(-row.loss / max(1, row.targets)) for row in scored)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an adapter does on one trial.

    Attributes:
        metric: That of the trial.
        value: Its value.
        rows: How likely the target of each row is held. For a classification the probability of the right label, at
            the temperature that suits these rows, as one merge should not seem worse than another for how sure it is
            of its answers: that goes by its norm. Else exp(−loss).
    """

    metric: str
    value: float
    rows: tuple[float, ...]

    @property
    def likelihood(self) -> float:
        """The mean over the rows."""
        return sum(self.rows) / len(self.rows)

    @property
    def lower_is_better(self) -> bool:
        """Of the metric."""
        return self.metric in LOWER_IS_BETTER


def task_of(name: str, adapter: Adapter) -> TaskFile:
    """The task that an adapter's record names.

    Raises:
        ConfigError: If it names none.
    """
    source = adapter.spec.lineage.parameters.get(TASK_SOURCE)
    if not isinstance(source, str):
        raise ConfigError(
            f"{name}: its record does not name the task it was trained on, so there are no rows to judge by; "
            "train it with hub train, or name the method yourself"
        )
    return load_task(source)


def unseen_rows(adapter: Adapter, task: TaskFile, limit: int, seed: int) -> Rows:
    """At most `limit` training rows that an adapter was not trained on, if its record says that there are some; any
    rows if there are neither so many of those nor 16.
    """
    everything = load_rows(task, "train")
    told = adapter.spec.lineage
    count = told.parameters.get("rows")
    if isinstance(count, int) and 0 < count < len(everything) and told.seed is not None:
        kept = everything.subsample(count, told.seed)
        if kept.hash == told.data_hash:
            seen = set(zip(kept.texts, kept.targets, strict=True))
            left = [pair for pair in zip(everything.texts, everything.targets, strict=True) if pair not in seen]
            if len(left) >= min(limit, ENOUGH):
                texts, targets = zip(*left, strict=True)
                everything = Rows("train", texts, targets, everything.labels)
    return everything.subsample(limit, seed)


def trials_of(adapters: Mapping[str, Adapter], limit: int, *, seed: int = 0, split: str = "train") -> list[Trial]:
    """A trial for each adapter, on its own task.

    Args:
        adapters: By name; their records say what they were trained on.
        limit: At most so many rows of each.
        seed: Which.
        split: Of `train`, rows that the adapter was not trained on are taken if there are enough.

    Raises:
        ConfigError: If a record names no task, or an adapter has no head for it.
        DataError: If rows cannot be had.
    """
    if limit < 1:
        raise MergeError(f"rows: got {limit}, wanted 1 or more of each task")
    found = []
    for name, adapter in adapters.items():
        task = task_of(name, adapter)
        unseen = split == "train"
        rows = unseen_rows(adapter, task, limit, seed) if unseen else load_rows(task, split, limit=limit, seed=seed)
        found.append(Trial(name, adapter, task, rows))
    return found


class Bench:
    """Loads the bases that trials need, each once, and judges adapters on all trials.

    Args:
        trials: What is judged on.
        base: Base model to load; by default the one that the adapters name.
        batch_size: Rows a batch.
    """

    def __init__(self, trials: Sequence[Trial], *, base: str | None = None, batch_size: int = 32) -> None:
        self.trials = tuple(trials)
        self.batch_size = batch_size
        self._base = base
        self._loaded: dict[TaskKind, LoadedBase] = {}

    def loaded(self, kind: TaskKind) -> LoadedBase:
        """The base for a kind of task."""
        if kind not in self._loaded:
            self._loaded[kind] = load_base(self._base or self.trials[0].adapter.spec.base.id, kind)
        return self._loaded[kind]

    def judge(self, candidate: Adapter | None) -> tuple[Verdict, ...]:
        """How an adapter, or the bare base, does on each trial.

        Raises:
            BaseMismatchError: If it belongs to another base.
        """
        return tuple(self.judge_on(candidate, number) for number in range(len(self.trials)))

    def judge_on(self, candidate: Adapter | None, number: int) -> Verdict:
        """How it does on one trial."""
        return self.trials[number].verdict(self.scored_on(candidate, number))

    def scored_on(self, candidate: Adapter | None, number: int, among: slice = ALL) -> list[Scored]:
        """What becomes of some rows of one trial, whose verdict is to be made when more of them are there."""
        trial = self.trials[number]
        queries = trial.queries(candidate, among)
        return score(self.loaded(trial.task.kind), queries, batch_size=self.batch_size)
