"""DyLoRA: each step draws a rank b and uses the first b rows of A and columns of B (Valipour et al. 2023,
arXiv:2210.07558).

s_b B[:, :b] A[:b], s_b = alpha / b (or alpha / √b): what `truncate` cuts out for a b is what the steps with that b
have trained. With `frozen` (the paper's second variant) a step trains row b alone, and the rows before it stay.

What comes of it is a LoRA of rank r; `hub compress --rank b` cuts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.config import DyloraConfig, LoraConfig
from graftory.training.recipes.base import Recipe, Scene, plain

A, B = LoraConfig.parts


def dylora(scene: Scene) -> Recipe:
    """The recipe."""
    config = scene.config
    assert isinstance(config, DyloraConfig)
    return Recipe(stand_ins=partial(_drawn, config), finish=_kept)


def _drawn(config: DyloraConfig, live: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights of a step, for a rank that it draws."""
    return first_ranks(config, live, int(torch.randint(1, config.rank + 1, ())))


def first_ranks(config: DyloraConfig, live: Mapping[str, Tensor], drawn: int) -> dict[str, Tensor]:
    """The weights with the ranks behind the first `drawn` at 0, and the scale of what is left in A."""
    made: dict[str, Tensor] = {}
    for path in config.targets:
        rank = config.rank_of(path)
        b = min(drawn, rank)
        part = rank / b if not config.rslora else (rank / b) ** 0.5
        down, up = live[f"{path}.{A}"], live[f"{path}.{B}"]
        used = (torch.arange(rank, device=down.device) < b).to(down.dtype)
        if config.frozen:
            learns = torch.arange(rank, device=down.device) == b - 1
            down = torch.where(learns[:, None], down, down.detach())
            up = torch.where(learns, up, up.detach())
        made[f"{path}.{A}"] = down * (part * used)[:, None]
        made[f"{path}.{B}"] = up * used
    return made


def _kept(adapter: Adapter) -> Adapter:
    return plain(adapter, LoraConfig, adapter.body_tensors())
