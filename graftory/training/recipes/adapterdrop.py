"""AdapterDrop: each step leaves out the adapters of the first n layers, n drawn anew (Rücklé et al. 2021,
arXiv:2010.11918).

What comes of it is a bottleneck that works without its first layers, up to `most` of them: `hub compress --drop-
layers n` takes them away, and those layers of a batch's rows need no adapter at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.config import AdapterdropConfig, BottleneckConfig
from graftory.config.base import layer_of
from graftory.errors import ConfigError
from graftory.training.recipes.base import Recipe, Scene, plain

_, _, UP, UP_BIAS = BottleneckConfig.parts


def adapterdrop(scene: Scene) -> Recipe:
    """The recipe.

    Raises:
        ConfigError: If `most` is every layer.
    """
    config = scene.config
    assert isinstance(config, AdapterdropConfig)
    layers = {layer_of(path) for path in config.targets}
    if config.most >= len(layers):
        raise ConfigError(f"most: got {config.most} of {len(layers)} layers with an adapter, wanted fewer")
    return Recipe(stand_ins=partial(_drawn, config), finish=_kept)


def _drawn(config: AdapterdropConfig, live: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return without_first(config.targets, live, int(torch.randint(0, config.most + 1, ())))


def without_first(targets: Sequence[str], live: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The weights with U and e of the adapters of the first layers at 0."""
    left_out = set(sorted({layer_of(path) for path in targets})[:count])
    dropped = {f"{path}.{part}" for path in targets for part in (UP, UP_BIAS) if layer_of(path) in left_out}
    return {key: torch.zeros_like(value) if key in dropped else value for key, value in live.items()}


def _kept(adapter: Adapter) -> Adapter:
    return plain(adapter, BottleneckConfig, adapter.body_tensors())
