"""seq: one adapter that keeps learning, the lower bound that every other strategy is held against."""

from __future__ import annotations

from dataclasses import replace

from graftory.adapter import Adapter, Parent
from graftory.continual.strategies.base import Answer, Context, Plan, own_head


class Sequential:
    """Task t trains the body that task t-1 left, with a fresh head; each task keeps its head as it was.

    Rows are answered by the newest body with the task's own head, so what is forgotten is in the body.
    """

    name = "seq"
    title = "one adapter for all tasks"
    routable = False

    def before_task(self, context: Context, task: str) -> Plan:
        """Start from the newest body, with the task's fresh head."""
        fresh, name = context.untrained[task], context.run
        if not context.done:
            return Plan(fresh, (), name)
        last = context.done[-1]
        tensors = {**last.adapter.body_tensors(), **fresh.head_tensors()}
        start = Adapter(replace(fresh.spec, config=last.adapter.spec.config), tensors)
        return Plan(start, (Parent(last.ref, last.digest, "continued"),), name)

    def answer(self, context: Context, task: str) -> Answer:
        """The newest body with the task's head: as it was learnt, or untrained before that."""
        step = context.step_of(task)
        head = own_head(context.untrained[task] if step is None else step.adapter)
        return Answer(context.done[-1].adapter if context.done else None, head)
