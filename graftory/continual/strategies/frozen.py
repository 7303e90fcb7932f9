"""frozen: the bare base with a trained head for every task. What adapters have to beat."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from graftory.continual.strategies.base import Answer, Context, Lesson, Needs, Plan, own_head
from graftory.continual.strategies.single import Single
from graftory.errors import ConfigError
from graftory.training import Hooks


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen(Single):
    """Task t trains its head alone; the adapter's body stays at its start, where its update is exactly zero."""

    title: ClassVar[str] = "bound: the base stays as it is, a head for each task"
    stores: ClassVar[str] = "head"
    needs: ClassVar[Needs] = Needs(("task",), heads="trains nothing but heads")

    def prepare(self, lesson: Lesson) -> Plan:
        """Start from the fresh adapter, whose body does not learn.

        Raises:
            ConfigError: If the task has no head, so that nothing would learn.
        """
        plan = Single.prepare(self, lesson)
        if not plan.start.head_tensors():
            raise ConfigError(f"strategy frozen: task {lesson.name!r} has no head to train; leave this bound out")
        return replace(plan, hooks=Hooks(frozen=tuple(plan.start.body_tensors())))

    def answer(self, context: Context, task: str) -> Answer:
        """The bare base with the task's head."""
        return Answer(None, own_head(context.head(task)))
