"""SparseAdapter: weights that matter little are taken out before the training (He et al. 2022, arXiv:2210.04284).

The score of a weight is |θ ∂L/∂θ| at the start, L the task's loss over a few batches (SNIP, Lee et al. 2019,
arXiv:1810.02340); of all D and U of all sites together those of the smallest scores are 0 from then on, biases stay.
The paper's "large-sparse": at one number of weights a larger, sparser bottleneck learns more.

What is kept is a bottleneck with zeros in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.config import BottleneckConfig, SparseConfig
from graftory.training.encode import Collator
from graftory.training.losses import model_inputs, row_losses
from graftory.training.recipes.base import Recipe, Scene, plain

DOWN, _, UP, _ = BottleneckConfig.parts
_ROWS = 128
"""Training rows, the first ones, whose loss is looked at."""


def sparse(scene: Scene) -> Recipe:
    """The recipe."""
    config = scene.config
    assert isinstance(config, SparseConfig)
    masks = kept_weights(scores(scene), config.pruned)
    return Recipe(stand_ins=partial(_masked, masks), finish=partial(_kept, masks))


def scores(scene: Scene) -> dict[str, Tensor]:
    """|θ ∂L/∂θ| of every weight of D and U."""
    own = scene.model.weights(scene.name)
    matrices = {key: value for key, value in own.items() if key.endswith((DOWN, UP))}
    sums = {key: torch.zeros_like(value) for key, value in matrices.items()}
    collator, device = Collator(scene.pad_id), next(iter(sums.values())).device
    rows = [{key: value for key, value in row.items() if key != "task_number"} for row in scene.examples[:_ROWS]]
    scene.model.eval()
    for start in range(0, len(rows), scene.settings.batch_size):
        batch = {
            key: value.to(device) for key, value in collator(rows[start : start + scene.settings.batch_size]).items()
        }
        with scene.model.route(scene.name):
            logits = scene.model(**model_inputs(scene.kind, batch)).logits
            loss = row_losses(scene.kind, logits, batch["labels"]).total.sum()
            grads = torch.autograd.grad(loss, list(matrices.values()))
        for key, grad in zip(matrices, grads, strict=True):
            sums[key] += grad
    return {key: (sums[key] * value.detach()).abs() for key, value in matrices.items()}


def kept_weights(found: Mapping[str, Tensor], pruned: float) -> dict[str, Tensor]:
    """Which weights stay, 1 or 0: but for a share `pruned` those of the largest scores, of all tensors together."""
    flat = torch.cat([score.flatten() for score in found.values()])
    order = flat.argsort(descending=True, stable=True)
    chosen = torch.zeros_like(flat)
    chosen[order[: len(flat) - int(pruned * len(flat))]] = 1
    parts = chosen.split([score.numel() for score in found.values()])
    return {key: part.view_as(score) for (key, score), part in zip(found.items(), parts, strict=True)}


def _masked(masks: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {key: value * masks[key] if key in masks else value for key, value in live.items()}


def _kept(masks: Mapping[str, Tensor], adapter: Adapter) -> Adapter:
    """With zeros written in; the numbers that are left started from their seed, which says nothing of the zeros."""
    made = plain(
        adapter, BottleneckConfig, _masked({key: mask.cpu() for key, mask in masks.items()}, adapter.body_tensors())
    )
    return replace(made, spec=replace(made.spec, config=replace(made.spec.config, init_seed=None)))
