"""Adaptive prefix tuning: gates on the prefixes of each layer (Zhang et al. 2023, arXiv:2305.15212).

Of each attention the keys and values are λ α ⊙ P_k and λ α ⊙ P_v: λ is a number that the layer learns, α = σ(W h_1),
[l], one gate for each prefix token, with h_1 what the attention reads at the row's first token ([CLS]). λ starts at 1
and W at 0, so that it starts as half of what prefix tuning starts as.

Encoders alone can have it. Everything else is as with prefixes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from graftory.adapters.banked_site import Used
from graftory.adapters.method import Method
from graftory.adapters.prefix import PREFIX
from graftory.adapters.prefix_reading import ReadingPrefixSite, encoder_attentions
from graftory.adapters.route import Selection
from graftory.config import AptConfig, PrefixConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKEN, LAYER = AptConfig.parts[-2:]


class AptSite(ReadingPrefixSite):
    """Prefixes at one attention and their gates: W [l, d] and λ [1] of each adapter."""

    padded: ClassVar = {**ReadingPrefixSite.padded, TOKEN: 0, LAYER: 0}

    def shapes(self, config: PrefixConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """As a prefix's, [l, d] and [1]."""
        wide = int(self.model.config.hidden_size)
        return {**super().shapes(config, path), TOKEN: (config.length, wide), LAYER: (1,)}

    def vectors(self, used: Used, selection: Selection) -> tuple[Tensor, Tensor]:
        """See `PrefixSite.vectors`: times λ α."""
        keys, values = super().vectors(used, selection)
        own = used.routing.index[:, 0]
        first = self.read(selection)[:, 0].to(keys.dtype)
        token, layer = (tensor[own] for tensor in used.tensors[-2:])
        gates = (layer * torch.sigmoid(torch.einsum("ed,eld->el", first, token)))[..., None]
        return keys * gates, values * gates


def _resolve(model: PreTrainedModel, config: AptConfig) -> tuple[str, ...]:
    encoder_attentions(model, AptConfig.method)
    return PREFIX.resolve(model, config)


def _initial(model: PreTrainedModel, path: str, config: AptConfig, generator: torch.Generator) -> dict[str, Tensor]:
    wide = int(model.config.hidden_size)
    gates = {TOKEN: torch.zeros(config.length, wide), LAYER: torch.ones(1)}
    return {**PREFIX.initial(model, path, config, generator), **gates}


def _site(model: PreTrainedModel, path: str, owner: int, _: AptConfig) -> AptSite:
    return AptSite(model, path, owner)


APT = Method(
    name="apt",
    title="Adaptive prefix tuning",
    paper="Zhang et al. 2023, arXiv:2305.15212",
    config=AptConfig,
    linear=False,
    site=_site,
    resolve=_resolve,
    initial=_initial,
)
