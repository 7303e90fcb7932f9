"""BitFit: only biases learn (Ben Zaken et al. 2022, arXiv:2106.10199).

A linear layer or LayerNorm that returns f(x) + b returns f(x) + b + δ. What is kept is δ, not the new bias: it starts
at 0, and in a mixed batch each row gets the sum of w δ over its own adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from graftory.adapters.adding_site import VectorSite
from graftory.adapters.architectures import GROUPS, architecture_of, head_paths, is_linear, module_at
from graftory.adapters.method import Method
from graftory.adapters.targets import paths_of
from graftory.config import BitfitConfig
from graftory.errors import UnsupportedAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

(DELTA,) = BitfitConfig.parts


class BitfitSite(VectorSite[BitfitConfig]):
    """What is added to the bias of one module: δ [d] of each adapter."""

    padded: ClassVar = {DELTA: 0}

    def shapes(self, config: BitfitConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """[d], as the bias."""
        del config, path
        return {DELTA: tuple(bias_of(self.module, self.path).shape)}


def bias_of(module: nn.Module, path: str) -> Tensor:
    """A module's bias.

    Raises:
        UnsupportedAdapterError: If it has none.
    """
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor):
        raise UnsupportedAdapterError(f"{path} has no bias, so bitfit cannot change it; take lora or ia3 there")
    return bias


def _resolve(model: PreTrainedModel, config: BitfitConfig) -> tuple[str, ...]:
    """Every linear layer and LayerNorm of the backbone with a bias, or those that the targets pick."""
    heads = (*head_paths(model), "lm_head")
    places = [
        path
        for path, module in model.named_modules()
        if (is_linear(module) or isinstance(module, nn.LayerNorm))
        and isinstance(getattr(module, "bias", None), Tensor)
        and path.split(".")[0] not in heads
    ]
    if not places:
        raise UnsupportedAdapterError(
            f"{type(model).__name__} has no biases outside of its head: nothing for bitfit to train; take lora or ia3"
        )
    chosen = [path for target in config.targets for path in _picked(model, target, places)]
    return tuple(sorted(set(chosen))) if config.targets else tuple(sorted(places))


def _picked(model: PreTrainedModel, target: str, places: list[str]) -> list[str]:
    found = paths_of(target, architecture_of(model), places)
    if not found:
        raise UnsupportedAdapterError(
            f"target {target!r} fits no module with a bias of {type(model).__name__}; leave it out for all of them, or "
            f"give a group ({', '.join(GROUPS)}), a role or the end of a module path, such as {places[0]}"
        )
    return found


def _initial(model: PreTrainedModel, path: str, config: BitfitConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Zeros: the model starts as the base."""
    del config, generator
    return {DELTA: torch.zeros(bias_of(module_at(model, path)[1], path).shape)}


def _site(model: PreTrainedModel, path: str, owner: int, _: BitfitConfig) -> BitfitSite:
    return BitfitSite(model, path, owner)


BITFIT = Method(
    name="bitfit",
    title="BitFit",
    paper="Ben Zaken et al. 2022, arXiv:2106.10199",
    config=BitfitConfig,
    linear=True,
    site=_site,
    resolve=_resolve,
    initial=_initial,
)
