"""ProPETL: masks learn as scores, straight through (Zeng et al. 2023, arXiv:2305.17682).

Each weight of the prototype has a score s at each site; a mask is 1 for the share of the largest scores of its matrix
and 0 for the others. Backward ∂L/∂s is taken to be ∂L/∂m = ∂L/∂(m ⊙ W₀) ⊙ W₀, so weights that are masked out get
gradients too, and come back if they help. Scores and the prototype learn together, scores at a rate of their own and
without decay, and are gone afterwards: masks are kept. The released code ranks |s|; here the scores themselves are
ranked, as the paper writes.

Scores start uniform in ±1/√fan_in, as there, handed out so that the masks are those of the adapter: a fresh one has
random masks, and one that is continued goes on with its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graftory.adapter import Adapter
from graftory.adapters.masked import MASK_DOWN, PROTOTYPE, kept_count, packed, unpacked
from graftory.config import PropetlConfig
from graftory.training.recipes.base import Recipe, Scene

_SCORES = "/scores"


def propetl(scene: Scene) -> Recipe:
    """The recipe."""
    config = scene.config
    assert isinstance(config, PropetlConfig)
    extra = _scores(config, scene.model.weights(scene.name))
    scores: dict[str, Tensor] = dict(extra.items())
    return Recipe(
        stand_ins=partial(_masked, config, scores),
        undecayed=(_SCORES,),
        rates=((_SCORES, config.mask_learning_rate),),
        extra=extra,
        finish=partial(_kept, config, scores),
    )


class StraightThrough(torch.autograd.Function):
    """Scores to a mask that keeps so many of the largest; backward its gradient is theirs."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, count: int) -> Tensor:
        """0 or 1, as floats."""
        del ctx
        return torch.zeros_like(scores).index_fill_(0, scores.topk(count).indices, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient as it is."""
        del ctx
        return grads[0], None


def mask_of(config: PropetlConfig, scores: Tensor) -> Tensor:
    """The mask of scores [n], with gradients to all of them."""
    mask: Tensor = StraightThrough.apply(scores, kept_count(config.kept, len(scores)))  # type: ignore[no-untyped-call]
    return mask


def scores_of(mask: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    """Uniform in ±bound, the largest ones where a mask [n] is 1."""
    drawn = ((torch.rand(len(mask), generator=generator) * 2 - 1) * bound).sort(descending=True).values
    # the order is random within those that are kept, and within the others
    order = (mask.float() + torch.rand(len(mask), generator=generator)).argsort(descending=True)
    return torch.empty_like(drawn).index_copy_(0, order, drawn)


def _scores(config: PropetlConfig, live: Mapping[str, Tensor]) -> nn.ParameterDict:
    generator = torch.Generator().manual_seed(1 + (config.init_seed or 0))
    down, _, up, _ = (live[f"{config.targets[0]}.{part}"] for part in PROTOTYPE)
    found = nn.ParameterDict()
    for key in _masks(config):
        weight = down if key.endswith(MASK_DOWN) else up
        mask = unpacked(live[key], weight.shape).flatten().cpu()
        found[_name(key)] = scores_of(mask, weight.shape[1] ** -0.5, generator).to(weight)
    return found


def _masks(config: PropetlConfig) -> list[str]:
    return [f"{path}.{part}" for path in config.targets for part in config.bits]


def _name(key: str) -> str:
    return key.replace(".", "/") + _SCORES


def _masked(config: PropetlConfig, scores: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights of a step: masks of floats, with gradients to the scores."""
    return {**live, **{key: mask_of(config, scores[_name(key)]) for key in _masks(config)}}


def _kept(config: PropetlConfig, scores: Mapping[str, Tensor], adapter: Adapter) -> Adapter:
    masks = {key: packed(mask_of(config, scores[_name(key)].detach().cpu())) for key in _masks(config)}
    return replace(adapter, tensors={**adapter.tensors, **masks})
