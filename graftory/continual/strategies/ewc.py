"""ewc: weights that mattered are held where they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graftory.adapter import Adapter
from graftory.config import option
from graftory.continual.checks import at_least
from graftory.continual.passes import learning, squared_gradients
from graftory.continual.strategies.base import Kept, Lesson, Needs
from graftory.continual.strategies.plugin import Plugin
from graftory.training import NO_HOOKS, Hooks, StepContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Ewc(Plugin):
    """Loss of task t: CE + ½ λ Σ_i Ω_i (θ_i − θ*_i)², θ* as task t−1 left them.

    After each task Ω ← γ Ω + F, F the diagonal of the empirical Fisher information on its rows: one Ω for all tasks, as
    in online EWC. θ are the weights of the body; where all tasks share a head, its too.
    """

    strength: float = option("λ, how firmly weights are held", 1000.0)
    decay: float = option("γ, how much of the importances of earlier tasks remains", 1.0)
    fisher_rows: int = option("rows of a task from which its importances are taken", 256)

    name: ClassVar[str] = "ewc"
    title: ClassVar[str] = "weights held by their importance"
    paper: ClassVar[str] = "Kirkpatrick et al. 2017, arXiv:1612.00796; online: Schwarz et al. 2018, arXiv:1805.06370"
    stores: ClassVar[str] = "importances (as many numbers as the adapter, once)"
    needs: ClassVar[Needs] = Needs(("task", "domain"))

    def __post_init__(self) -> None:
        at_least(0, strength=self.strength, decay=self.decay)
        at_least(1, fisher_rows=self.fisher_rows)

    def hooks(self, lesson: Lesson, kept: Kept) -> Hooks:
        """Add the penalty, from the second task on."""
        newest = lesson.context.newest()
        if newest is None:
            return NO_HOOKS

        def term(step: StepContext) -> Mapping[str, Tensor]:
            weights = learning(step.model, step.name, head=lesson.context.scenario == "domain")
            return {"ewc": self.strength * penalty(weights, newest.tensors, kept.tensors)}

        return Hooks(loss_terms=(term,))

    def keep(self, lesson: Lesson, kept: Kept, adapter: Adapter) -> Kept:
        """Ω ← γ Ω + F."""
        rows = lesson.rows.subsample(self.fisher_rows, lesson.seed_of("fisher"))
        shared = lesson.context.scenario == "domain"
        fisher = squared_gradients(lesson.loaded, adapter, lesson.task, rows, head=shared)
        before = kept.tensors
        return Kept({key: self.decay * before[key] + f if before else f for key, f in fisher.items()})


def penalty(weights: Mapping[str, Tensor], anchor: Mapping[str, Tensor], importance: Mapping[str, Tensor]) -> Tensor:
    """½ Σ_i Ω_i (θ_i − θ*_i)².

    Args:
        weights: θ.
        anchor: θ*, of the same shapes, by the same names.
        importance: Ω, likewise.
    """
    parts = [
        (importance[key].to(weight.device) * (weight - anchor[key].to(weight.device)).square()).sum()
        for key, weight in weights.items()
    ]
    total: Tensor = sum(parts[1:], parts[0])
    return 0.5 * total
