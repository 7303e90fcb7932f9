"""ProPETL: one bottleneck for all layers, and a binary mask for each (Zeng et al. 2023, arXiv:2305.17682).

At every site, in any placement of a bottleneck, U act(D h + c) + e with D = m ⊙ D₀ and U = m' ⊙ U₀; the prototype
D₀ [size, d], c, U₀ [d, size], e is the same at all of them, and kept at the first. Masks keep a share of the weights of
each matrix; biases have none, as in the released code. They are applied when they are used, so a mixed batch has
it beside bottlenecks, and `graftory.adapters.expansions.as_bottleneck` makes one of it.

Fresh: the prototype as a bottleneck starts, so the update is zero; masks at random. How masks learn is in
`graftory/training/recipes/propetl.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftory.adapters.architectures import module_at
from graftory.adapters.bottleneck import BOTTLENECK, residual_width
from graftory.adapters.masked import MASK_DOWN, MASK_UP, PROTOTYPE, kept_count, packed
from graftory.adapters.method import Method
from graftory.config import BottleneckConfig, PropetlConfig
from graftory.errors import UnsupportedAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _initial(model: PreTrainedModel, path: str, config: PropetlConfig, generator: torch.Generator) -> dict[str, Tensor]:
    first = config.targets[0]
    width, common = (residual_width(model, module_at(model, site)[0]) for site in (path, first))
    if width != common:
        raise UnsupportedAdapterError(
            f"{path} is {width} wide and {first} {common}; one bottleneck is for sites of one width, choose --target"
        )
    tensors = {part: _random(config, config.size * width, generator) for part in (MASK_DOWN, MASK_UP)}
    if path == first:
        fresh = BOTTLENECK.initial(model, path, config, generator)
        tensors |= {name: fresh[part] for name, part in zip(PROTOTYPE, BottleneckConfig.parts, strict=True)}
    return tensors


def _random(config: PropetlConfig, count: int, generator: torch.Generator) -> Tensor:
    mask = torch.zeros(count)
    mask[torch.randperm(count, generator=generator)[: kept_count(config.kept, count)]] = 1
    return packed(mask)


PROPETL = Method(
    name="propetl",
    title="ProPETL",
    paper="Zeng et al. 2023, arXiv:2305.17682",
    config=PropetlConfig,
    linear=False,
    site=BOTTLENECK.site,
    resolve=BOTTLENECK.resolve,
    initial=_initial,
)
