"""What can be added to `seq`: loss terms, gradient hooks, company, and something to keep from task to task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from graftory.adapter import Adapter
from graftory.continual.strategies.base import NOTHING, Kept, Lesson, Needs
from graftory.training import NO_HOOKS, Hooks
from graftory.training.company import ALONE, Company


class Plugin(ABC):
    """One addition. Parameters are the fields of a subclass.

    `kept` is what the same plugin kept at the last step; it is empty at the first task.
    """

    __slots__ = ()

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    stores: ClassVar[str]
    needs: ClassVar[Needs]

    @property
    def heads(self) -> str:
        """See `Needs.heads`; may depend on the parameters."""
        return self.needs.heads

    def company(self, lesson: Lesson, kept: Kept) -> Company:
        """What is attached beside the adapter."""
        del lesson, kept
        return ALONE

    @abstractmethod
    def hooks(self, lesson: Lesson, kept: Kept) -> Hooks:
        """How it changes the training."""

    def keep(self, lesson: Lesson, kept: Kept, adapter: Adapter) -> Kept:
        """What is kept for the next task, now that the adapter has been trained."""
        del lesson, kept, adapter
        return NOTHING


def together(parts: list[Hooks]) -> Hooks:
    """The hooks of several plugins; gradient hooks run in their order."""
    if not parts:
        return NO_HOOKS
    return Hooks(
        loss_terms=tuple(term for part in parts for term in part.loss_terms),
        on_gradients=tuple(hook for part in parts for hook in part.on_gradients),
        observers=tuple(observer for part in parts for observer in part.observers),
    )


def all_of(parts: list[Company]) -> Company:
    """The company of several plugins; a head that one wants to learn learns for all of them."""
    heads = {name: head for part in parts for name, head in part.heads.items()}
    adapters = {name: adapter for part in parts for name, adapter in part.adapters.items() if name not in heads}
    return Company(adapters, heads)
