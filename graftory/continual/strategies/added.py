"""Strategies whose adapters are added up: the earlier sum stays, a fresh adapter learns beside it."""

from __future__ import annotations

from contextlib import AbstractContextManager

from graftory.adapter import Adapter
from graftory.adapters import AdaptedModel
from graftory.continual.stack import stacked
from graftory.continual.strategies.base import (
    Answer,
    Context,
    Finished,
    Lesson,
    Plan,
    Strategy,
    after_newest,
    fresh_directions,
    newest_answers,
)
from graftory.training import Hooks
from graftory.training.company import Company, Learnt

SUM = "adapters of the steps before"
"""Under this name the earlier sum is attached."""


class Added(Strategy):
    """Task t trains a fresh adapter t while the sum of the adapters 1..t−1 runs beside it, frozen.

    Version t in the hub is the whole sum (see `stack`), which answers alone.
    """

    __slots__ = ()

    def prepare(self, lesson: Lesson) -> Plan:
        """Start from a fresh adapter, with the earlier sum beside it."""
        context, newest = lesson.context, lesson.context.newest()
        company = Company() if newest is None else Company({SUM: newest})
        hooks = Hooks() if newest is None else Hooks(route=both)
        return Plan(fresh_directions(lesson), after_newest(context), context.run, hooks, company)

    def finish(self, lesson: Lesson, learnt: Learnt) -> Finished:
        """Add the adapter to the sum."""
        return Finished(self.sum_with(lesson, learnt.adapter))

    def sum_with(self, lesson: Lesson, adapter: Adapter) -> Adapter:
        """The sum of all adapters so far."""
        newest = lesson.context.newest()
        return adapter if newest is None else stacked(newest, adapter)

    def answer(self, context: Context, task: str) -> Answer:
        """The sum with the task's head."""
        return newest_answers(context, task)


def both(adapted: AdaptedModel, name: str) -> AbstractContextManager[None]:
    """The route of the adapter that learns and the earlier sum together."""
    return adapted.route([{name: 1.0, SUM: 1.0}], [_head(adapted, name)])


def _head(adapted: AdaptedModel, name: str) -> str | None:
    task = adapted.spec(name).task
    return name if task is not None and task.head else None
