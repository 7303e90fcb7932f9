"""a-gem: a step may not go against old rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.adapters import AdaptedModel
from graftory.config import option
from graftory.continual.checks import at_least
from graftory.continual.heads import earlier_heads
from graftory.continual.memory import as_kept, remembered, replay_of, with_lesson
from graftory.continual.passes import learning
from graftory.continual.strategies.base import Kept, Lesson, Needs
from graftory.continual.strategies.plugin import Plugin
from graftory.training import NO_HOOKS, Hooks
from graftory.training.company import Company


@dataclass(frozen=True, slots=True, kw_only=True)
class AGem(Plugin):
    """g ← g − (gᵀ g_ref / g_refᵀ g_ref) g_ref where gᵀ g_ref < 0, with g_ref the gradient of the loss on old rows.

    g are the gradients of all weights that old rows and new ones share: the body's, and the head's where there is one
    for all. Old rows go through the heads of their own tasks, which stay.
    """

    capacity: int = option("rows kept, of all tasks together", 200)
    batch: int = option("old rows in a step", 32)

    name: ClassVar[str] = "a-gem"
    title: ClassVar[str] = "steps projected to do old rows no harm"
    paper: ClassVar[str] = "Chaudhry et al. 2019, arXiv:1812.00420"
    stores: ClassVar[str] = "rows (bounded)"
    needs: ClassVar[Needs] = Needs(("task", "domain"), stored_data=True)

    def __post_init__(self) -> None:
        at_least(1, capacity=self.capacity, batch=self.batch)

    def company(self, lesson: Lesson, kept: Kept) -> Company:
        """The heads of the earlier tasks, as they are."""
        del kept
        return Company(earlier_heads(lesson.context))

    def hooks(self, lesson: Lesson, kept: Kept) -> Hooks:
        """Project the gradients, from the second task on."""
        memory, replay, seed = remembered(kept), replay_of(lesson), lesson.seed_of("a-gem")
        name, shared = lesson.context.run, lesson.context.scenario == "domain"
        if not memory.samples:
            return NO_HOOKS

        def hook(adapted: AdaptedModel, step: int) -> None:
            samples = memory.draw(self.batch, seed, step)
            weights = [w for w in learning(adapted, name, head=shared).values() if w.grad is not None]
            logits, batch = replay.logits(adapted, name, samples)
            loss = replay.losses(logits, batch, samples).mean()
            reference = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            project(gradients, list(reference))

        return Hooks(on_gradients=(hook,))

    def keep(self, lesson: Lesson, kept: Kept, adapter: Adapter) -> Kept:
        """Put the task's rows into the reservoir."""
        del adapter
        return as_kept(with_lesson(remembered(kept), lesson, self.capacity))


@torch.no_grad()
def project(gradients: list[Tensor], reference: list[Tensor]) -> None:
    """Take from g, in place, its part along g_ref if that is negative; each is a list of tensors seen as one vector."""
    pairs = list(zip(gradients, reference, strict=True))
    along = torch.stack([(g * r).sum() for g, r in pairs]).sum()
    length = torch.stack([(r * r).sum() for r in reference]).sum()
    if along < 0:
        for gradient, other in pairs:
            gradient -= (along / length) * other
