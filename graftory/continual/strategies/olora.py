"""o-lora: a fresh adapter for every task, in directions that no earlier one reads; all of them together answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from graftory.config import option
from graftory.continual.checks import at_least
from graftory.continual.passes import learning
from graftory.continual.stack import DOWN
from graftory.continual.strategies.added import Added
from graftory.continual.strategies.base import Lesson, Needs, Plan
from graftory.training import StepContext


@dataclass(frozen=True, slots=True, kw_only=True)
class OLora(Added):
    """Loss of task t: CE + λ₁ / (L r²) · Σ_{i<t} Σ_layers ‖A_i A_tᵀ‖₁ + λ₂ Σ ‖W_t‖₂, with A_i, B_i frozen for i < t.

    L layers, rank r, W_t the weights of adapter t. Rows are answered by Σ_i B_i A_i with the task's head. The published
    code leaves out the division; here λ₁ means the same whatever the model's size. Of a bottleneck, A is the map down.
    """

    orthogonality: float = option("λ₁, weight of the overlap with earlier adapters", 50.0)
    size: float = option("λ₂, weight of the new adapter's norms", 0.0)

    title: ClassVar[str] = "orthogonal adapters, added up"
    paper: ClassVar[str] = "Wang et al. 2023, arXiv:2310.14152"
    stores: ClassVar[str] = "adapter, head"
    needs: ClassVar[Needs] = Needs(("task", "domain"))

    def __post_init__(self) -> None:
        at_least(0, orthogonality=self.orthogonality, size=self.size)

    def prepare(self, lesson: Lesson) -> Plan:
        """Add the penalties, from the second task on."""
        plan, newest = Added.prepare(self, lesson), lesson.context.newest()
        if newest is None:
            return plan
        end = f".{DOWN[newest.spec.method]}"
        old = {key: tensor for key, tensor in newest.body_tensors().items() if key.endswith(end)}

        def term(step: StepContext) -> Mapping[str, Tensor]:
            weights = learning(step.model, step.name, head=False)
            terms = {"overlap": self.orthogonality * overlap(old, weights)}
            if self.size:
                terms["size"] = self.size * torch.stack([weight.norm() for weight in weights.values()]).sum()
            return terms

        return replace(plan, hooks=replace(plan.hooks, loss_terms=(term,)))


def overlap(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Tensor:
    """1 / (L r²) · Σ_layers ‖A_old A_newᵀ‖₁.

    Args:
        old: A of all earlier adapters, one on the other, [Σ r_i, d_in] at each of L layers.
        new: A of the new one, [r, d_in], by the same names; others are not looked at.
    """
    parts = [(old[key].to(new[key].device) @ new[key].T).abs().sum() / new[key].shape[0] ** 2 for key in old]
    return torch.stack(parts).mean()
