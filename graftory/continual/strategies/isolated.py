"""isolated: a fresh adapter and head for every task, frozen afterwards. Nothing can be forgotten."""

from __future__ import annotations

from graftory.continual.strategies.base import Answer, Context, Plan, own_head


class Isolated:
    """Task t trains adapter t alone; rows of t are answered by adapter t, found by id or by a router.

    With the id given, BWT = F = 0 exactly and the order of the tasks does not matter, by construction.
    """

    name = "isolated"
    title = "an adapter for every task"
    routable = True

    def before_task(self, context: Context, task: str) -> Plan:
        """Start from the task's own fresh adapter."""
        return Plan(context.untrained[task], (), f"{context.run}-{task}")

    def answer(self, context: Context, task: str) -> Answer:
        """The task's own adapter; before it is learnt, the bare base with the task's untrained head."""
        step = context.step_of(task)
        if step is None:
            return Answer(None, own_head(context.untrained[task]))
        return Answer(step.adapter, own_head(step.adapter))
