"""Compacter: bottleneck adapters of Kronecker products (Karimi Mahabadi et al. 2021, arXiv:2106.04647).

U act(D h + c) + e, as a bottleneck in any of its placements, with D and U made by `phm.product`: n (size + d) k
numbers a matrix in place of size d, and one A for all layers. They are expanded when they are used, so a compacter
lies beside bottlenecks in a mixed batch, and `graftory.adapters.expansions.as_bottleneck` makes one of it.

Fresh: A normal, s and t as Glorot draws them, but s of U, which is 0: the update is exactly zero at the start. (The
paper's code draws A with a spread of 0.01 and has a small update at the start.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graftory.adapters.architectures import module_at
from graftory.adapters.bottleneck import BOTTLENECK, residual_width
from graftory.adapters.method import Method
from graftory.adapters.phm import DOWN_RIGHT, RULE, phm_shapes
from graftory.config import CompacterConfig
from graftory.errors import UnsupportedAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPREAD = {DOWN_RIGHT, "phm_down_left", "phm_up_right"}
"""The parts that are drawn."""


def _initial(
    model: PreTrainedModel, path: str, config: CompacterConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    width = residual_width(model, module_at(model, path)[0])
    if width % config.division:
        raise UnsupportedAdapterError(
            f"{path} is {width} wide, which {config.division} products do not divide; give a --division that does"
        )
    tensors = {part: torch.zeros(shape) for part, shape in phm_shapes(config, path, width).items()}
    for part, tensor in tensors.items():
        if part in _SPREAD:
            for matrix in tensor:
                nn.init.xavier_normal_(matrix, generator=generator)
        elif part == RULE:
            tensor.normal_(0.0, config.spread, generator=generator)
    return tensors


COMPACTER = Method(
    name="compacter",
    title="Compacter",
    paper="Karimi Mahabadi et al. 2021, arXiv:2106.04647",
    config=CompacterConfig,
    linear=False,
    site=BOTTLENECK.site,
    resolve=BOTTLENECK.resolve,
    initial=_initial,
)
