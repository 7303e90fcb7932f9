"""isolated: a fresh adapter and head for every task, frozen afterwards. Nothing can be forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftory.continual.strategies.base import Answer, Context, Lesson, Needs, Plan, Strategy, own_head


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolated(Strategy):
    """Task t trains adapter t alone; rows of t are answered by adapter t, found by id or by a router.

    With the id given, BWT = F = 0 exactly and the order of the tasks does not matter, by construction.
    """

    title: ClassVar[str] = "an adapter for every task, found by a router"
    paper: ClassVar[str] = ""
    stores: ClassVar[str] = "adapter, centroids"
    needs: ClassVar[Needs] = Needs(("task", "domain", "class"), methods=("lora", "bottleneck", "smop"))
    routable: ClassVar[bool] = True

    def prepare(self, lesson: Lesson) -> Plan:
        """Start from the task's own fresh adapter."""
        return Plan(lesson.context.untrained[lesson.name], (), f"{lesson.context.run}-{lesson.name}")

    def answer(self, context: Context, task: str) -> Answer:
        """The task's own adapter; before it is learnt, the bare base with the task's untrained head."""
        step = context.step_of(task)
        if step is None:
            return Answer(None, own_head(context.untrained[task]))
        return Answer(step.adapter, own_head(step.adapter))
