"""seq: one adapter that keeps learning, the lower bound that every other strategy is held against; and its plugins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftory.continual.heads import kept_heads
from graftory.continual.strategies.base import (
    NOTHING,
    Answer,
    Context,
    Finished,
    Lesson,
    Needs,
    Plan,
    Strategy,
    after_newest,
    newest_answers,
    start_from,
)
from graftory.continual.strategies.plugin import Plugin, all_of, together
from graftory.training.company import Learnt


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequential(Strategy):
    """Task t trains the body that task t-1 left, with a fresh head; each task keeps its head as it was.

    Rows are answered by the newest body with the task's own head, so what is forgotten is in the body. Plugins add to
    the training; they are told nothing of each other.
    """

    plugins: tuple[Plugin, ...] = ()
    paper: ClassVar[str] = ""

    @property
    def title(self) -> str:
        """See `Strategy`."""
        return " + ".join(["one adapter for all tasks", *(plugin.title for plugin in self.plugins)])

    @property
    def stores(self) -> str:
        """See `Strategy`."""
        return ", ".join(["head", *(plugin.stores for plugin in self.plugins)])

    @property
    def needs(self) -> Needs:
        """What all of its plugins can do."""
        parts = [Needs(("task", "domain")), *(plugin.needs for plugin in self.plugins)]
        scenarios = tuple(name for name in parts[0].scenarios if all(name in part.scenarios for part in parts))
        methods = tuple(name for name in parts[0].methods if all(name in part.methods for part in parts))
        heads = next((plugin.heads for plugin in self.plugins if plugin.heads), "")
        return Needs(scenarios, any(part.stored_data for part in parts), methods, heads=heads)

    def prepare(self, lesson: Lesson) -> Plan:
        """Start from the newest body, with the task's fresh head."""
        context = lesson.context
        kept = {plugin: context.kept.under(plugin.name) for plugin in self.plugins}
        return Plan(
            start_from(context, lesson.name, context.newest()),
            after_newest(context),
            context.run,
            together([plugin.hooks(lesson, kept[plugin]) for plugin in self.plugins]),
            all_of([plugin.company(lesson, kept[plugin]) for plugin in self.plugins]),
        )

    def finish(self, lesson: Lesson, learnt: Learnt) -> Finished:
        """Let every plugin keep what it needs."""
        kept = kept_heads(learnt.heads) if learnt.heads else NOTHING
        for plugin in self.plugins:
            before = lesson.context.kept.under(plugin.name)
            kept |= plugin.keep(lesson, before, learnt.adapter).moved(plugin.name)
        return Finished(learnt.adapter, kept)

    def answer(self, context: Context, task: str) -> Answer:
        """The newest body with the task's head: as it was learnt, or untrained before that."""
        return newest_answers(context, task)
