"""gated: attention over keys of the tasks mixes their adapters, row by row, so that no row has to say its task."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from graftory.adapter import Parent
from graftory.adapters import AdaptedModel
from graftory.adapters.route import Row
from graftory.config import option
from graftory.continual.attention import PARTS, TaskAttention, fresh_key, fresh_network
from graftory.continual.checks import at_least
from graftory.continual.passes import batches
from graftory.continual.strategies.base import (
    Answer,
    Context,
    Finished,
    Kept,
    Lesson,
    Needs,
    Plan,
    Strategy,
    own_head,
    start_from,
)
from graftory.training import Hooks, StepContext
from graftory.training.company import Company, Learnt
from graftory.training.mixture import Mixture, embedded

_MEAN, _SPREAD = "mean", "deviation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated(Strategy):
    """Shared attention (SAPT): a row with features e gets Σ_i a_i(e) · adapter i, a as in `TaskAttention`.

    Task t trains adapter t, its key and the query network, with the adapters and keys 1..t−1 frozen. The loss is
    CE + λ₁ · mean over pseudo-samples z of KL(a_old(z) ‖ a(z)) + λ₂ · mean over the rows of −log a_t(e), a_old the
    attention as task t−1 left it, 0 on key t. z is drawn from 𝒩(μ_j, diag σ_j²) of the features of an earlier task j,
    so that no row is kept. λ₂ is not in the paper: without it nothing pulls rows to the new key but what its adapter,
    which begins at nothing, does for them, and the first key was seen to take all.
    """

    hidden: int = option("units between the two maps of the query network", 100)
    temperature: float = option("T, softens the mixture", 1.0)
    reflection: float = option("λ₁, weight of the old attention on pseudo-samples", 1.0)
    own: float = option("λ₂, weight of the new key on the task's own rows; 0 is the paper's loss", 1.0)
    pseudo: int = option("pseudo-samples in a step", 32)

    title: ClassVar[str] = "adapters mixed row by row, by attention over keys of the tasks"
    paper: ClassVar[str] = "Zhao et al. 2024, arXiv:2401.08295"
    stores: ClassVar[str] = "adapter, head, key, mean and deviation of features (query network, once)"
    needs: ClassVar[Needs] = Needs(("task", "domain"), reads=False)

    def __post_init__(self) -> None:
        at_least(1, hidden=self.hidden, pseudo=self.pseudo)
        at_least(0, reflection=self.reflection, own=self.own)
        at_least(1e-6, temperature=self.temperature)

    def prepare(self, lesson: Lesson) -> Plan:
        """Put the earlier adapters beside a fresh one, and let rows choose."""
        context, own = lesson.context, f"{lesson.context.run}-{lesson.name}"
        names = {_attached(step.task): step.adapter for step in context.done}
        attention, seed = self._attention(lesson), lesson.seed_of("pseudo")
        kind, headed = lesson.task.kind, bool(context.untrained[lesson.name].head_tensors())
        present: list[Row] = []
        chosen: list[Tensor] = []

        def route(adapted: AdaptedModel, name: str) -> AbstractContextManager[None]:
            return adapted.route(present, [name if headed else None] * len(present))

        def route_rows(adapted: AdaptedModel, name: str, batch: Mapping[str, Tensor]) -> AbstractContextManager[None]:
            weights = attention.weigh(embedded(adapted.model, kind, batch))
            chosen[:] = [weights]
            present[:] = [dict(zip((*names, name), row.unbind(), strict=True)) for row in weights]
            return route(adapted, name)

        old = self._of(context.kept) if context.done else None

        def reflect(step: StepContext) -> Mapping[str, Tensor]:
            assert old is not None
            z = pseudo_samples(context.kept, self.pseudo, seed + step.step)
            held = divergence(old(z), attention(z.to(attention.keys.device)))
            drawn = -chosen[0][:, -1].clamp(min=1e-12).log().mean()
            return {"reflection": self.reflection * held, "own": self.own * drawn}

        hooks = Hooks(
            loss_terms=() if old is None else (reflect,),
            undecayed=("extra.key", *(f"extra.{part}" for part in PARTS)),
            route=route,
            route_rows=route_rows,
            extra=attention,
        )
        parents = tuple(Parent(step.ref, step.digest, "continued") for step in context.done)
        return Plan(start_from(context, lesson.name, None), parents, own, hooks, Company(names))

    def finish(self, lesson: Lesson, learnt: Learnt) -> Finished:
        """Keep the key, the query network, and what pseudo-samples of the task are drawn from."""
        before, extra = lesson.context.kept.under("gate").tensors, learnt.extra
        features = torch.cat(
            [
                embedded(lesson.loaded.model, lesson.task.kind, batch).cpu()
                for batch in batches(lesson.loaded, lesson.task, lesson.rows, lesson.batch_size)
            ]
        )
        new = {
            "keys": extra["key"],
            _MEAN: features.mean(0, keepdim=True),
            _SPREAD: features.std(0, correction=0, keepdim=True),
        }
        grown = {name: torch.cat([before[name], row]) if before else row for name, row in new.items()}
        return Finished(learnt.adapter, Kept({**{part: extra[part] for part in PARTS}, **grown}).moved("gate"))

    def answer(self, context: Context, task: str) -> Answer:
        """The mixture of all adapters so far with the task's head; the bare base before the first."""
        head = own_head(context.head(task))
        if not context.done:
            return Answer(None, head)
        adapters = tuple(step.adapter for step in context.done)
        return Answer(None, head, Mixture(adapters, self._of(context.kept).weigh))

    def _of(self, kept: Kept) -> TaskAttention:
        """The attention that was kept; it does not learn."""
        tensors = kept.under("gate").tensors
        made = TaskAttention({part: tensors[part] for part in PARTS}, tensors["keys"], self.temperature, learns=False)
        return made.requires_grad_(False)

    def _attention(self, lesson: Lesson) -> TaskAttention:
        """The attention with a fresh key for the new task, which learns."""
        tensors = lesson.context.kept.under("gate").tensors
        table: Any = lesson.loaded.model.get_input_embeddings()
        width = int(table.weight.shape[1])
        network = {part: tensors[part] for part in PARTS} if tensors else None
        network = network or fresh_network(width, self.hidden, lesson.seed_of("query"))
        key = fresh_key(width, lesson.seed_of("key"))
        keys = torch.cat([tensors["keys"], key]) if tensors else key
        return TaskAttention(network, keys, self.temperature, learns=True)


def pseudo_samples(kept: Kept, count: int, seed: int) -> Tensor:
    """Features as rows of the earlier tasks have them, each of a task drawn at random.

    Args:
        kept: Means and deviations of the features of each task, under `gate/`.
        count: How many.
        seed: Decides which.

    Returns:
        [count, d].
    """
    tensors, generator = kept.under("gate").tensors, torch.Generator().manual_seed(seed)
    mean, spread = tensors[_MEAN], tensors[_SPREAD]
    task = torch.randint(len(mean), (count,), generator=generator)
    return mean[task] + spread[task] * torch.randn(count, mean.shape[1], generator=generator)


def divergence(old: Tensor, new: Tensor) -> Tensor:
    """KL(a_old ‖ a_new), mean over rows, where a_old has no weight on the last key.

    Args:
        old: log a_old, [rows, t − 1].
        new: log a_new, [rows, t].
    """
    return functional.kl_div(new[:, :-1], old.to(new.device), reduction="batchmean", log_target=True)


def _attached(task: str) -> str:
    """The name under which an earlier task's adapter is attached. No adapter of a hub can have it."""
    return f"adapter of {task}"
