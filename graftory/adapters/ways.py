"""Methods that are ways to train a LoRA, a bottleneck or a prompt: what comes of them is stored and used as
such.

While they learn they are what they become, so each is that method's row with its own configuration; what differs in the
training is in `graftory/training/recipes/`, one file each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftory.adapters.bottleneck import BOTTLENECK, DOWN, UP
from graftory.adapters.lora import LORA
from graftory.adapters.prompt import PROMPT
from graftory.config import (
    AdamixConfig,
    AdapterdropConfig,
    DyloraConfig,
    PTuningConfig,
    SoraConfig,
    SparseConfig,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _spread(model: PreTrainedModel, path: str, config: SparseConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """D and U normal: where U is 0 no weight has a gradient and a value, and pruning would be blind."""
    tensors = BOTTLENECK.initial(model, path, config, generator)
    fresh = {part: tensors[part].normal_(0.0, config.spread, generator=generator) for part in (DOWN, UP)}
    return {**tensors, **fresh}


DYLORA = replace(
    LORA, name="dylora", title="DyLoRA", paper="Valipour et al. 2023, arXiv:2210.07558", config=DyloraConfig
)
SORA = replace(LORA, name="sora", title="SoRA", paper="Ding et al. 2023, arXiv:2311.11696", config=SoraConfig)
ADAPTERDROP = replace(
    BOTTLENECK,
    name="adapterdrop",
    title="AdapterDrop",
    paper="Rücklé et al. 2021, arXiv:2010.11918",
    config=AdapterdropConfig,
)
SPARSE = replace(
    BOTTLENECK,
    name="sparse",
    title="SparseAdapter",
    paper="He et al. 2022, arXiv:2210.04284",
    config=SparseConfig,
    initial=_spread,
)
ADAMIX = replace(
    BOTTLENECK, name="adamix", title="AdaMix", paper="Wang et al. 2022, arXiv:2205.12410", config=AdamixConfig
)
P_TUNING = replace(
    PROMPT, name="p_tuning", title="P-tuning", paper="Liu et al. 2021, arXiv:2103.10385", config=PTuningConfig
)
WAYS = (DYLORA, SORA, ADAPTERDROP, SPARSE, ADAMIX, P_TUNING)
