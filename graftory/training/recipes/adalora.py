"""AdaLoRA while it trains: PEFT's rank allocator after each step, and its orthogonality in the loss.

The loss gets γ times the mean of |A Aᵀ − I| and |BᵀB − I| over all modules (equation 4 of arXiv:2303.10512; PEFT, which
is followed, takes norms where the paper has their squares). Importance is looked at after the optimizer's step, as PEFT
says. An adapter that ranks were taken away from before, and that is continued, keeps those that it has.
"""

# ruff: noqa: ARG002 - the signature is that of transformers

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftory.adapter import Adapter
from graftory.adapters.peft_trained.site import peft_model_of
from graftory.config.peft import AdaloraConfig
from graftory.settings import TrainSettings
from graftory.training.recipes.base import Recipe, Scene
from graftory.training.trainer import StepContext


def adalora(scene: Scene) -> Recipe:
    """The recipe.

    Raises:
        ConfigError: If the first and last steps leave none to take ranks away in.
    """
    config = scene.config
    assert isinstance(config, AdaloraConfig)
    terms = (partial(orthogonality, config.orthogonality),)
    if config.rank_pattern is not None:
        return Recipe(terms=terms)
    planned = replace(config, total_step=steps_of(scene.settings, len(scene.examples)))
    theirs, slot = peft_model_of(scene.model, scene.name), scene.model.slot_of(scene.name)
    theirs.peft_config[slot].total_step = planned.total_step
    return Recipe(
        terms=terms,
        callbacks=(RankAllocation(theirs),),
        finish=partial(_kept, planned, theirs.peft_config[slot], slot),
        resumes=False,
    )


class RankAllocation(TrainerCallback):
    """Lets PEFT measure importance and take ranks away."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The step that was just made has the next number."""
        self.theirs.base_model.update_and_allocate(state.global_step + 1)


def orthogonality(factor: float, context: StepContext) -> Mapping[str, Tensor]:
    """γ times the mean distance of the factors from orthogonal ones."""
    weights = context.model.weights(context.name)
    squares = [weight @ weight.T for name, weight in weights.items() if name.endswith("lora_A")]
    squares += [weight.T @ weight for name, weight in weights.items() if name.endswith("lora_B")]
    far = [torch.linalg.matrix_norm(square - torch.eye(len(square)).to(square)) for square in squares]
    return {"orthogonality": factor * torch.stack(far).mean()}


def steps_of(settings: TrainSettings, rows: int) -> int:
    """The optimizer steps of a training, as transformers counts them."""
    if settings.max_steps is not None:
        return settings.max_steps
    an_epoch = max(1, math.ceil(math.ceil(rows / settings.batch_size) / settings.accumulation))
    return math.ceil(settings.epochs * an_epoch)


def _kept(planned: AdaloraConfig, theirs: Any, slot: str, adapter: Adapter) -> Adapter:
    """The adapter, which PEFT has cut to the ranks that are left, and those in its configuration."""
    left = {key.replace(f".{slot}", ""): tuple(map(bool, kept)) for key, kept in (theirs.rank_pattern or {}).items()}
    return replace(adapter, spec=replace(adapter.spec, config=replace(planned, rank_pattern=left or None)))
