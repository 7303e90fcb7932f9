"""What PHA adds to a hyperformer: a retriever that sees of which task a row is, and prototypes that it is pulled to.

The retriever maps the mean hidden state f of a row in the frozen base to q = W₂ ReLU(W₁ f + b₁) + b₂; the prototype
k_τ of a task is its embedding, which the generator reads too (Zhao et al. 2023, arXiv:2310.11670). With cosines s,
for rows i of tasks τ_i, P_i the other rows of i's task, the loss of the tasks gets λ (L_ins + L_pro):

    L_ins = mean_i mean_{p ∈ P_i} -log exp(s(q_i, q_p) / T) / Σ_{a ≠ i} exp(s(q_i, q_a) / T)
    L_pro = mean_i -log exp(s(q_i, k_τi) / T) / Σ_τ exp(s(q_i, k_τ) / T)

The paper's retriever reads the encoder with adapters in it, and compares the rows of a batch; here it reads the base
alone, so that a task that nobody has seen can be compared with all, and rows of every task at each step. (The
released code leaves the task's own prototype out of L_pro's denominator.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from graftory.compose.hyperformer.module import live_tensors
from graftory.config import PhaConfig
from graftory.data import Rows
from graftory.training import LoadedBase
from graftory.training.features import features_of
from graftory.training.trainer import StepContext

RETRIEVER = "retriever"
_MOST = 1024
"""Rows of a task that are looked at."""


def retrieved(tensors: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """q of rows, [rows, e], for their features [rows, width]."""
    hidden, out = (
        (tensors[f"{RETRIEVER}.{name}.weight"], tensors[f"{RETRIEVER}.{name}.bias"])
        for name in ("project_in", "project_out")
    )
    return functional.linear(functional.relu(functional.linear(features, *hidden)), *out)


def prototypes(config: PhaConfig, tensors: Mapping[str, Tensor]) -> Tensor:
    """k of all tasks, [tasks, e]."""
    return torch.stack([tensors[f"tasks.{number}.embedding"] for number in range(len(config.tasks))])


def instance_loss(queries: Tensor, tasks: Tensor, temperature: float) -> Tensor:
    """L_ins for q [n, e] and the tasks' numbers [n]; rows that are alone of their task count only as others'."""
    unit = functional.normalize(queries, dim=-1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    logs = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf).log_softmax(-1)
    same = (tasks[:, None] == tasks) & ~itself
    counts = same.sum(-1)
    each = logs.masked_fill(~same, 0.0).sum(-1) / counts.clamp(min=1)
    return -each.sum() / (counts > 0).sum().clamp(min=1)


def prototype_loss(queries: Tensor, tasks: Tensor, known: Tensor, temperature: float) -> Tensor:
    """L_pro for q [n, e], the tasks' numbers [n] and k [tasks, e]."""
    scores = functional.normalize(queries, dim=-1) @ functional.normalize(known, dim=-1).T
    return functional.cross_entropy(scores / temperature, tasks)


def similarities(config: PhaConfig, tensors: Mapping[str, Tensor], features: Tensor) -> list[float]:
    """The mean cosine of rows with the prototype of each task."""
    with torch.no_grad():
        unit = functional.normalize(retrieved(tensors, features), dim=-1)
        found = (unit @ functional.normalize(prototypes(config, tensors), dim=-1).T).mean(0)
    return [float(value) for value in found]


def task_features(loaded: LoadedBase, rows: Rows, seed: int) -> Tensor:
    """The features of a task's rows, of at most 1024 of them; no adapter may be attached."""
    return features_of(loaded, rows.subsample(_MOST, seed).texts)


@dataclass(frozen=True, slots=True)
class Contrast:
    """The loss term of a training: λ (L_ins + L_pro) over rows of each task, drawn anew at each step.

    Attributes:
        config: The configuration, with all tasks.
        features: Of the rows of the tasks that learn, which are the last ones.
        seed: Of what is drawn.
    """

    config: PhaConfig
    features: tuple[Tensor, ...]
    seed: int

    def __call__(self, context: StepContext) -> Mapping[str, Tensor]:
        """Nothing where λ is 0."""
        if not self.config.contrast:
            return {}
        tensors = live_tensors(context.model)
        known = prototypes(self.config, tensors)
        drawn, tasks = self.drawn(context.step)
        queries, tasks = retrieved(tensors, drawn.to(known)), tasks.to(known.device)
        temperature, factor = self.config.contrast_temperature, self.config.contrast
        terms = {"prototypes": factor * prototype_loss(queries, tasks, known, temperature)}
        if len(self.features) > 1:
            terms["instances"] = factor * instance_loss(queries, tasks, temperature)
        return terms

    def drawn(self, step: int) -> tuple[Tensor, Tensor]:
        """Features of rows of every task, and the tasks' numbers; they depend on the seed and the step alone."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        count, first = self.config.contrast_rows, len(self.config.tasks) - len(self.features)
        picked = [own[torch.randint(len(own), (count,), generator=generator)] for own in self.features]
        numbers: Sequence[int] = range(first, len(self.config.tasks))
        return torch.cat(picked), torch.tensor(numbers).repeat_interleave(count)
