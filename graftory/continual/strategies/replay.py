"""replay: some old rows in every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.config import option
from graftory.continual.checks import at_least
from graftory.continual.heads import earlier_heads
from graftory.continual.memory import Sample, as_kept, remembered, replay_of, with_lesson
from graftory.continual.passes import attached, batches
from graftory.continual.strategies.base import Kept, Lesson, Needs
from graftory.continual.strategies.plugin import Plugin
from graftory.errors import ConfigError
from graftory.training import NO_HOOKS, Hooks, StepContext
from graftory.training.company import Company
from graftory.training.losses import model_inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRows(Plugin):
    """Loss of task t: CE(batch) + β CE(M) + α ‖z(M') − z_then(M')‖², M and M' batches from a reservoir of old rows.

    α = 0 is experience replay (ER), α > 0 dark experience replay (DER++): z_then are the logits of a row when its task
    had been learnt. Old rows go through the heads of their own tasks, which go on learning.
    """

    capacity: int = option("rows kept, of all tasks together", 200)
    batch: int = option("old rows in a step", 8)
    beta: float = option("β, weight of the old rows' loss", 1.0)
    alpha: float = option("α, weight of the distance to their old logits; 0 keeps none", 0.0)

    name: ClassVar[str] = "replay"
    title: ClassVar[str] = "old rows replayed"
    paper: ClassVar[str] = "Chaudhry et al. 2019, arXiv:1902.10486; DER++: Buzzega et al. 2020, arXiv:2004.07211"
    stores: ClassVar[str] = "rows (bounded), heads"
    needs: ClassVar[Needs] = Needs(("task", "domain"), stored_data=True)

    def __post_init__(self) -> None:
        at_least(1, capacity=self.capacity, batch=self.batch)
        at_least(0, beta=self.beta, alpha=self.alpha)

    @property
    def heads(self) -> str:
        """See `Plugin`."""
        return "keeps the logits of heads (alpha > 0)" if self.alpha else ""

    def company(self, lesson: Lesson, kept: Kept) -> Company:
        """The heads of the earlier tasks, which learn."""
        del kept
        return Company(heads=earlier_heads(lesson.context))

    def hooks(self, lesson: Lesson, kept: Kept) -> Hooks:
        """Add the old rows' losses, from the second task on.

        Raises:
            ConfigError: If logits are to be kept of a language model.
        """
        if self.alpha and not lesson.context.untrained[lesson.name].head_tensors():
            raise ConfigError("replay: alpha keeps logits, which are too many where there is no head; set alpha to 0")
        memory, replay, seed = remembered(kept), replay_of(lesson), lesson.seed_of("replay")
        if not memory.samples:
            return NO_HOOKS

        def term(step: StepContext) -> Mapping[str, Tensor]:
            samples = memory.draw(self.batch, seed, step.step)
            logits, batch = replay.logits(step.model, step.name, samples)
            terms = {"replay": self.beta * replay.losses(logits, batch, samples).mean()}
            if self.alpha:
                samples = memory.draw(self.batch, seed + 1, step.step)
                logits, _ = replay.logits(step.model, step.name, samples)
                terms["logits"] = self.alpha * drift(logits, samples)
            return terms

        return Hooks(loss_terms=(term,))

    def keep(self, lesson: Lesson, kept: Kept, adapter: Adapter) -> Kept:
        """Put the task's rows into the reservoir."""
        logits = _logits(lesson, adapter) if self.alpha else ()
        return as_kept(with_lesson(remembered(kept), lesson, self.capacity, logits))


def drift(logits: Tensor, samples: tuple[Sample, ...]) -> Tensor:
    """Mean over rows of the squared distance between the logits now and then; each row has as many as its task."""
    parts = [
        (logits[row, : len(sample.logits)].float() - logits.new_tensor(sample.logits).float()).square().mean()
        for row, sample in enumerate(samples)
    ]
    return torch.stack(parts).mean()


def _logits(lesson: Lesson, adapter: Adapter) -> tuple[tuple[float, ...], ...]:
    rows: list[tuple[float, ...]] = []
    with attached(lesson.loaded, adapter) as adapted, torch.no_grad():
        for batch in batches(lesson.loaded, lesson.task, lesson.rows, lesson.batch_size):
            logits = adapted(**model_inputs(lesson.task.kind, batch)).logits
            rows += [tuple(row) for row in logits.float().tolist()]
    return tuple(rows)
