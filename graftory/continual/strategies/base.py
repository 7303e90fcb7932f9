"""What a strategy decides: what a task is trained from and how, what is kept of it, and what answers a task's rows.

The runner does everything else. A strategy holds parameters and no state: all it may use is in the context, which is
made anew from the committed steps, so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from graftory.adapter import Adapter, Parent
from graftory.adapters import new_adapter
from graftory.continual.readout import Readout
from graftory.data import Rows, TaskFile
from graftory.schema import Json
from graftory.training import NO_HOOKS, Hooks, LoadedBase
from graftory.training.company import ALONE, Company, Learnt
from graftory.training.mixture import Mixture

Scenario = Literal["task", "domain", "class"]
"""What is known of a row at test. `task`: which task it is of. `domain`: not that, but all tasks have the same labels.
`class`: not that either, and every task has labels of its own."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a strategy can do, and what it wants for it."""

    scenarios: tuple[Scenario, ...]
    stored_data: bool = False
    """Whether it keeps, or reads again, rows of earlier tasks."""
    methods: tuple[str, ...] = ("lora", "bottleneck")
    """Adapter methods that it works on."""
    reads: bool = True
    """Whether its adapters say how plain text is read, as the probe has it read; weights by prompt do not."""
    heads: str = ""
    """What it does with the heads of tasks, if it makes no sense without: language models have none."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a strategy keeps besides adapters, from one task to the next: a basis, importances, samples."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Json] = field(default_factory=dict)

    def under(self, prefix: str) -> Kept:
        """What is kept under `prefix/`, by its names behind that."""
        start = f"{prefix}/"
        return Kept(
            {name.removeprefix(start): tensor for name, tensor in self.tensors.items() if name.startswith(start)},
            {name.removeprefix(start): value for name, value in self.values.items() if name.startswith(start)},
        )

    def moved(self, prefix: str) -> Kept:
        """The same under `prefix/`."""
        tensors = {f"{prefix}/{name}": tensor for name, tensor in self.tensors.items()}
        return Kept(tensors, {f"{prefix}/{name}": value for name, value in self.values.items()})

    def __or__(self, other: Kept) -> Kept:
        return Kept({**self.tensors, **other.tensors}, {**self.values, **other.values})


NOTHING = Kept()


@dataclass(frozen=True, slots=True)
class Step:
    """A task that has been learnt and committed to the hub."""

    task: str
    ref: str
    digest: str
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class Context:
    """What is known before a task is learnt."""

    run: str
    """Name of the sequence."""
    tasks: tuple[str, ...]
    untrained: Mapping[str, Adapter]
    """A fresh adapter with a fresh head for every task; the same at every step."""
    done: tuple[Step, ...]
    """Steps so far, in order."""
    scenario: Scenario = "task"
    kept: Kept = NOTHING
    """What the strategy kept at the last step."""

    def step_of(self, task: str) -> Step | None:
        """The step that learnt a task, or None before it."""
        return next((step for step in self.done if step.task == task), None)

    def newest(self) -> Adapter | None:
        """The adapter of the last step."""
        return self.done[-1].adapter if self.done else None

    def head(self, task: str) -> Adapter:
        """The adapter whose head answers a task: one head for all in the `domain` scenario, else the task's own, as it
        was learnt, or as it was kept since, or untrained.
        """
        newest, own = self.newest(), self.step_of(task)
        if self.scenario == "domain" and newest is not None:
            return newest
        later = self.kept.under(f"heads/{task}").tensors
        adapter = self.untrained[task] if own is None else own.adapter
        return Adapter(adapter.spec, {**adapter.tensors, **later}) if later else adapter

    def earlier(self) -> tuple[str, ...]:
        """The tasks learnt so far that have a head of their own."""
        return () if self.scenario == "domain" else tuple(s.task for s in self.done if s.adapter.head_tensors())


@dataclass(frozen=True, slots=True)
class Lesson:
    """The task to learn, and all there is to learn it with."""

    context: Context
    name: str
    """The task's name in the context."""
    task: TaskFile
    rows: Rows
    loaded: LoadedBase
    batch_size: int
    seed_of: Callable[[str], int]
    """The seed of a phase of this task."""
    read: Callable[[str], tuple[TaskFile, Rows]]
    """Training rows of a task of the context, read again."""

    @property
    def number(self) -> int:
        """Of the step, from 1."""
        return len(self.context.done) + 1


@dataclass(frozen=True, slots=True)
class Plan:
    """How the next task is learnt."""

    start: Adapter
    """Body and head to train from."""
    parents: tuple[Parent, ...]
    name: str
    """Name in the hub."""
    hooks: Hooks = NO_HOOKS
    company: Company = ALONE
    trains: bool = True
    """If not, what is started from is what is learnt."""


@dataclass(frozen=True, slots=True)
class Finished:
    """What came of a task: the version for the hub, and what is kept."""

    adapter: Adapter
    kept: Kept = NOTHING


@dataclass(frozen=True, slots=True)
class Answer:
    """What answers the rows of a task."""

    body: Adapter | None
    """None is the bare base."""
    head: Adapter | None
    """The adapter whose head is used; None where the task has no head."""
    mixture: Mixture | None = None
    """Adapters in place of one body, mixed row by row."""
    readout: Readout | None = None
    """In place of a head of the model."""

    def bodies(self) -> tuple[Adapter, ...]:
        """All adapters that take part, but for the head."""
        return (*(() if self.body is None else (self.body,)), *(self.mixture.adapters if self.mixture else ()))


class Strategy(ABC):
    """One way to learn tasks one after another. Parameters are the fields of a subclass."""

    __slots__ = ()

    @property
    @abstractmethod
    def title(self) -> str:
        """What it is in a few words."""

    @property
    @abstractmethod
    def paper(self) -> str:
        """Where it was published; empty for a baseline."""

    @property
    @abstractmethod
    def stores(self) -> str:
        """What it stores for each task, in words."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What it can do."""

    @property
    def routable(self) -> bool:
        """Whether a router can choose among its adapters, so that it needs no task id at test."""
        return False

    @abstractmethod
    def prepare(self, lesson: Lesson) -> Plan:
        """Say what the task is trained from, and how."""

    def finish(self, lesson: Lesson, learnt: Learnt) -> Finished:
        """Make the version for the hub out of what was learnt, and say what is kept. Must depend on its arguments
        alone: after a kill it is done again.
        """
        del lesson
        return Finished(learnt.adapter)

    @abstractmethod
    def answer(self, context: Context, task: str) -> Answer:
        """Say what answers a task, learnt or not, after the steps done so far."""


def own_head(adapter: Adapter) -> Adapter | None:
    """The adapter itself if it has a head."""
    return adapter if adapter.head_tensors() else None


def start_from(context: Context, task: str, body: Adapter | None) -> Adapter:
    """A body with the head that a task begins with: its fresh one, or the one for all in the `domain` scenario."""
    fresh, newest = context.untrained[task], context.newest()
    head = newest.head_tensors() if context.scenario == "domain" and newest is not None else fresh.head_tensors()
    body = fresh if body is None else body
    return Adapter(replace(fresh.spec, config=body.spec.config), {**body.body_tensors(), **head})


def fresh_directions(lesson: Lesson) -> Adapter:
    """A fresh body drawn anew for the task, so that no two have the same directions, with the head it begins with."""
    spec = lesson.context.untrained[lesson.name].spec
    config = replace(spec.config, init_seed=lesson.seed_of("init"))
    return start_from(lesson.context, lesson.name, new_adapter(lesson.loaded.model, config, base=spec.base))


def after_newest(context: Context) -> tuple[Parent, ...]:
    """The lineage of what goes on from the last step."""
    return tuple(Parent(step.ref, step.digest, "continued") for step in context.done[-1:])


def newest_answers(context: Context, task: str) -> Answer:
    """The newest body with the task's head: as it was learnt, or untrained before that."""
    return Answer(context.newest(), own_head(context.head(task)))
