"""migu: only the units that speak loudest on the new task are updated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from graftory.adapters import AdaptedModel
from graftory.config import option
from graftory.continual.checks import share
from graftory.continual.passes import learning
from graftory.continual.strategies.base import Kept, Lesson, Needs
from graftory.continual.strategies.plugin import Plugin
from graftory.training import Hooks, StepContext, processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Migu(Plugin):
    """For every linear map h = W x of the adapter: n = mean over tokens of |h| / ‖h‖₁; only the rows of W whose n is
    among the largest share get their gradient.

    The maps of LoRA are A (on x) and B (on A x). They are measured in every forward of a step and forgotten after it.
    Needs no data and no task ids.
    """

    share: float = option("share of the output units that are updated", 0.3)

    name: ClassVar[str] = "migu"
    title: ClassVar[str] = "only the loudest units learn"
    paper: ClassVar[str] = "Du et al. 2024, arXiv:2406.17245"
    stores: ClassVar[str] = "nothing"
    needs: ClassVar[Needs] = Needs(("task", "domain"), methods=("lora",))

    def __post_init__(self) -> None:
        share(share=self.share)

    def hooks(self, lesson: Lesson, kept: Kept) -> Hooks:
        """Listen to the inputs, mask the gradients."""
        del kept
        loudness = _Loudness(lesson.context.run, self.share)
        return Hooks((loudness.without_padding,), (loudness.mask,), observers=(loudness.listen,))


@dataclass(slots=True)
class _Loudness:
    """What the adapter reads in the forwards of one step, and what follows from it."""

    name: str
    share: float
    inputs: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)

    def listen(self, path: str, x: Tensor) -> None:
        """Remember what a site reads."""
        self.inputs[path] = x.detach()

    def without_padding(self, step: StepContext) -> Mapping[str, Tensor]:
        """Keep what is no padding; with gradient accumulation a step has several forwards. Adds nothing to the loss."""
        mask = step.batch["attention_mask"].bool()
        if step.counted is not None:
            mask = mask & step.counted.bool()[:, None]
        for path, x in self.inputs.items():
            self.tokens.setdefault(path, []).append(x[mask] if mask.shape == x.shape[:2] else x.flatten(0, -2))
        self.inputs.clear()
        return {}

    @torch.no_grad()
    def mask(self, adapted: AdaptedModel, step: int) -> None:
        """Zero the gradients of all rows but the loudest."""
        del step
        weights = learning(adapted, self.name, head=False)
        for path, parts in self.tokens.items():
            x = torch.cat(parts)
            for part in ("lora_A.weight", "lora_B.weight"):
                weight = weights[f"{path}.{part}"]
                x = x.to(weight.dtype) @ weight.T
                if weight.grad is not None:
                    weight.grad *= loudest(x, self.share)[:, None]
        self.tokens.clear()


def loudest(outputs: Tensor, share: float) -> Tensor:
    """1 for the output units with the largest mean of |h| / ‖h‖₁, 0 for the others.

    Args:
        outputs: h, [tokens, units].
        share: Which part of the units get 1, at least one; of equal ones the first.

    Returns:
        [units], of the outputs' dtype.
    """
    size = outputs.abs()
    loudness = processes.mean_rows(size / size.sum(1, keepdim=True).clamp(min=1e-12))
    count = max(1, round(share * len(loudness)))
    chosen = loudness.argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(loudness).index_fill_(0, chosen, 1.0)
