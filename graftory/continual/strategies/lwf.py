"""lwf: on the new task's inputs, the old tasks' outputs are to stay what they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from graftory.adapters import AdaptedModel
from graftory.config import option
from graftory.continual.checks import at_least
from graftory.continual.heads import earlier_heads
from graftory.continual.strategies.base import Kept, Lesson, Needs
from graftory.continual.strategies.plugin import Plugin
from graftory.training import NO_HOOKS, Hooks, StepContext
from graftory.training.company import Company
from graftory.training.encode import IGNORED
from graftory.training.losses import model_inputs

_TEACHER = "adapter of the last step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lwf(Plugin):
    """Loss of task t: CE + λ Σ_{j<t} T² · KL(p_old,j ‖ p_new,j), p = softmax(z / T), on the inputs of task t.

    old: the body as task t−1 left it; new: the body that learns; both through the head of task j, which stays. A
    regression's output is held by its squared error. A step costs one forward of the old body more, whatever the
    number of tasks; where a base's head is several modules, every earlier head costs a forward of each body.
    """

    strength: float = option("λ, weight of the old outputs", 1.0)
    temperature: float = option("T, softens the outputs", 2.0)

    name: ClassVar[str] = "lwf"
    title: ClassVar[str] = "old outputs held on new inputs"
    paper: ClassVar[str] = "Li and Hoiem 2016, arXiv:1606.09282"
    stores: ClassVar[str] = "nothing (the last version is the teacher)"
    needs: ClassVar[Needs] = Needs(("task", "domain"))

    def __post_init__(self) -> None:
        at_least(0, strength=self.strength)
        at_least(1e-3, temperature=self.temperature)

    def company(self, lesson: Lesson, kept: Kept) -> Company:
        """The last body as teacher, and the earlier heads."""
        del kept
        newest = lesson.context.newest()
        return Company({} if newest is None else {_TEACHER: newest, **earlier_heads(lesson.context)})

    def hooks(self, lesson: Lesson, kept: Kept) -> Hooks:
        """Add the distillation, from the second task on."""
        del kept
        newest = lesson.context.newest()
        if newest is None:
            return NO_HOOKS
        # without heads of their own, tasks share the adapter's or have none
        heads = [*earlier_heads(lesson.context)]
        kind = lesson.task.kind

        def pairs(step: StepContext) -> Iterable[tuple[Tensor, Tensor]]:
            inputs = model_inputs(kind, step.batch)
            with torch.no_grad(), step.model.route(_TEACHER, heads[0] if heads else None):
                first = step.model(**inputs).logits
                if not heads:
                    return [(first, step.outputs.logits)]
                old = [first, *_again(step.model, _TEACHER, heads[1:], inputs)]
            return zip(old, _again(step.model, step.name, heads, inputs), strict=True)

        def term(step: StepContext) -> Mapping[str, Tensor]:
            counted = step.batch["labels"] if kind in ("causal_lm", "seq2seq") else None
            if counted is not None and kind == "causal_lm":
                counted = functional.pad(counted[:, 1:], (0, 1), value=IGNORED)
            losses = [distance(old, new, self.temperature, counted) for old, new in pairs(step)]
            return {"lwf": self.strength * torch.stack(losses).sum()}

        return Hooks(loss_terms=(term,))


def _again(model: AdaptedModel, body: str, heads: Sequence[str], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Logits through each head of rows that the body has just been run on."""
    found = model.through_heads(heads)
    if found is not None:
        return found
    found = []
    for head in heads:
        with model.route(body, head):
            found.append(model(**inputs).logits)
    return found


def distance(old: Tensor, new: Tensor, temperature: float, labels: Tensor | None = None) -> Tensor:
    """T² · KL(softmax(old / T) ‖ softmax(new / T)), mean over rows or counted tokens; one output: (new − old)².

    Args:
        old: Logits, [rows, outputs] or [rows, length, outputs].
        new: Logits, of the same shape.
        temperature: T.
        labels: Where a token's label is -100, it does not count; [rows, length].
    """
    if labels is not None:
        old, new = old[labels.ne(IGNORED)], new[labels.ne(IGNORED)]
    old, new = old.float(), new.float()
    if old.shape[-1] == 1:
        return (new - old).square().mean()
    log_old, log_new = (functional.log_softmax(logits / temperature, dim=-1) for logits in (old, new))
    divergence = functional.kl_div(log_new, log_old, reduction="sum", log_target=True)
    return temperature**2 * divergence / max(1, len(old))
