"""What a strategy decides: what a task is trained from, and what answers a task's rows.

The runner does everything else. A strategy holds no state: all it may use is in the context, which is
made anew from the committed steps, so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from graftory.adapter import Adapter, Parent


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

    def step_of(self, task: str) -> Step | None:
        """The step that learnt a task, or None before it."""
        return next((step for step in self.done if step.task == task), None)


@dataclass(frozen=True, slots=True)
class Plan:
    """How the next task is learnt."""

    start: Adapter
    """Body and head to train from."""
    parents: tuple[Parent, ...]
    name: str
    """Name in the hub."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What answers the rows of a task whose id is given."""

    body: Adapter | None
    """None is the bare base."""
    head: Adapter | None
    """The adapter whose head is used; None where the task has no head."""


class Strategy(Protocol):
    """One way to learn tasks one after another."""

    @property
    def name(self) -> str:
        """What a sequence file calls it."""

    @property
    def title(self) -> str:
        """What a report calls it."""

    @property
    def routable(self) -> bool:
        """Whether a router can choose among its adapters, so that it needs no task id at test."""

    def before_task(self, context: Context, task: str) -> Plan:
        """Say what the task is trained from."""

    def answer(self, context: Context, task: str) -> Answer:
        """Say what answers a task, learnt or not, after the steps done so far."""


def own_head(adapter: Adapter) -> Adapter | None:
    """The adapter itself if it has a head."""
    return adapter if adapter.head_tensors() else None
