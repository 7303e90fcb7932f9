"""Ways to train a LoRA, a bottleneck, a prompt or a sparse update, one file each; their rows are in
`graftory/adapters/ways.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from graftory.config import (
    AdamixConfig,
    AdapterConfig,
    AdapterdropConfig,
    DiffConfig,
    DyloraConfig,
    PropetlConfig,
    PTuningConfig,
    SoraConfig,
    SparseConfig,
    SptConfig,
)
from graftory.config.peft import AdaloraConfig
from graftory.training.recipes.adalora import adalora
from graftory.training.recipes.adamix import adamix
from graftory.training.recipes.adapterdrop import adapterdrop
from graftory.training.recipes.base import Recipe, Scene
from graftory.training.recipes.diff import diff
from graftory.training.recipes.dylora import dylora
from graftory.training.recipes.p_tuning import p_tuning
from graftory.training.recipes.propetl import propetl
from graftory.training.recipes.sora import sora
from graftory.training.recipes.sparse import sparse
from graftory.training.recipes.spt import spt

__all__ = ["RECIPES", "Recipe", "Scene", "recipe_of"]

RECIPES: Mapping[type[AdapterConfig], Callable[[Scene], Recipe]] = {
    DyloraConfig: dylora,
    SoraConfig: sora,
    AdapterdropConfig: adapterdrop,
    SparseConfig: sparse,
    AdamixConfig: adamix,
    AdaloraConfig: adalora,
    PropetlConfig: propetl,
    PTuningConfig: p_tuning,
    DiffConfig: diff,
    SptConfig: spt,
}
"""Every way to train, by its configuration; other methods learn as they are."""


def recipe_of(scene: Scene) -> Recipe:
    """How the adapter of a scene learns."""
    make = RECIPES.get(type(scene.config))
    return Recipe() if make is None else make(scene)
