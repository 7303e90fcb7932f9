"""joint: at every step one fresh adapter learns all tasks so far, from all their rows. A bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftory.continual.heads import attached_as, companions, kept_heads
from graftory.continual.strategies.base import (
    Answer,
    Context,
    Finished,
    Lesson,
    Needs,
    Plan,
    Strategy,
    after_newest,
    newest_answers,
)
from graftory.training.company import Company, Learnt, OtherTask


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint(Strategy):
    """Step t trains one body and t heads on the rows of tasks 1..t, mixed in every batch. R_jj are the J_j of
    Intransigence. Epochs are over all rows, so a step takes longer the more tasks there are.
    """

    title: ClassVar[str] = "bound: all tasks so far learnt together, anew at every step"
    paper: ClassVar[str] = ""
    stores: ClassVar[str] = "all rows, heads"
    needs: ClassVar[Needs] = Needs(("task", "domain"), stored_data=True)

    def prepare(self, lesson: Lesson) -> Plan:
        """Start afresh, with all heads fresh and the rows of the earlier tasks mixed in."""
        context = lesson.context
        # in the domain scenario there is one head, which is the adapter's own
        own = (
            {} if context.scenario == "domain" else companions(context.untrained, [step.task for step in context.done])
        )
        names = {step.task: attached_as(step.task) for step in context.done}
        others = (OtherTask(*lesson.read(task), name if name in own else None) for task, name in names.items())
        company = Company(heads=own, fresh=tuple(own), others=tuple(others))
        return Plan(context.untrained[lesson.name], after_newest(context), context.run, company=company)

    def finish(self, lesson: Lesson, learnt: Learnt) -> Finished:
        """Keep the heads of the earlier tasks as they are now."""
        del lesson
        return Finished(learnt.adapter, kept_heads(learnt.heads))

    def answer(self, context: Context, task: str) -> Answer:
        """The newest body with the task's head."""
        return newest_answers(context, task)
