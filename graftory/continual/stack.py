"""One adapter that does what several do together: their updates added, exactly.

LoRA: Σ_i s B_i A_i = s [B_1, …, B_t] [A_1; …; A_t], rank Σ r_i. Bottleneck: the hidden units side by side, the output
biases added. So a sum of updates is a plain adapter, which answers alone, loads in PEFT and can be taken apart again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.config import AdapterConfig, BottleneckConfig, LoraConfig
from graftory.errors import ConfigError

T = TypeVar("T")

DOWN: Mapping[str, str] = {"lora": "lora_A.weight", "bottleneck": "adapter_down.weight"}
"""The part that reads, [units, d_in], of each method."""
UP: Mapping[str, str] = {"lora": "lora_B.weight", "bottleneck": "adapter_up.weight"}
"""The part that writes, [d_out, units]."""
BIASES: Mapping[str, tuple[str, ...]] = {"lora": (), "bottleneck": ("adapter_down.bias", "adapter_up.bias")}
"""Its biases: of the units, and of the output."""


def stacked(old: Adapter, new: Adapter) -> Adapter:
    """The sum of two adapters, with the specification, the head and the lineage of the new one.

    Raises:
        ConfigError: If they differ in more than the number of units.
    """
    config = _common(old.spec.config, new.spec.config)
    method = new.spec.method
    # it has no one initialisation any more
    config = replace(config, init_seed=None)
    tensors: dict[str, Tensor] = {}
    for path in config.targets:
        down, up = f"{path}.{DOWN[method]}", f"{path}.{UP[method]}"
        tensors[down] = torch.cat([old.tensors[down], new.tensors[down]])
        tensors[up] = torch.cat([old.tensors[up], new.tensors[up]], dim=1)
        if BIASES[method]:
            units, output = (f"{path}.{part}" for part in BIASES[method])
            tensors[units] = torch.cat([old.tensors[units], new.tensors[units]])
            tensors[output] = old.tensors[output] + new.tensors[output]
    return Adapter(replace(new.spec, config=config), {**tensors, **new.head_tensors()})


def blocks(adapter: Adapter, path: str, units: int) -> list[tuple[Tensor, Tensor]]:
    """The maps at one site of the adapters that were stacked, each of so many units: [units, d_in], [d_out, units]."""
    down, up = (adapter.tensors[f"{path}.{part[adapter.spec.method]}"] for part in (DOWN, UP))
    return list(zip(down.split(units), up.split(units, dim=1), strict=True))


def units_of(config: AdapterConfig, path: str) -> int:
    """Rank, or hidden units, at one site.

    Raises:
        ConfigError: If the method has neither.
    """
    if isinstance(config, LoraConfig):
        return config.rank_of(path)
    if isinstance(config, BottleneckConfig) and config.parts == BottleneckConfig.parts:
        return config.size_of(path)
    raise ConfigError(f"adapters of method {config.method} cannot be added up; use lora or bottleneck")


def _common(old: AdapterConfig, new: AdapterConfig) -> AdapterConfig:
    """The configuration of the sum. Scales stay what they are: alpha grows with the rank."""
    if isinstance(old, LoraConfig) and isinstance(new, LoraConfig):
        ranks = {path: old.rank_of(path) + new.rank_of(path) for path in new.targets}
        alphas = {path: _alpha(old, new, path, rank) for path, rank in ranks.items()}
        rank, alpha = _usual(ranks), _usual(alphas)
        return replace(
            new,
            rank=rank,
            alpha=alpha,
            rank_pattern={path: value for path, value in ranks.items() if value != rank},
            alpha_pattern={path: value for path, value in alphas.items() if value != alpha},
        )
    if isinstance(old, BottleneckConfig) and isinstance(new, BottleneckConfig) and old.scale == new.scale:
        sizes = {path: old.size_of(path) + new.size_of(path) for path in new.targets}
        size = _usual(sizes)
        return replace(new, size=size, size_pattern={path: value for path, value in sizes.items() if value != size})
    raise ConfigError(f"a {old.method} and a {new.method} adapter of other scales cannot be added up")


def _alpha(old: LoraConfig, new: LoraConfig, path: str, rank: int) -> float:
    scale = new.scale_of(path)
    if not math.isclose(scale, old.scale_of(path), rel_tol=1e-6):
        raise ConfigError(f"{path}: scales {old.scale_of(path):g} and {scale:g} cannot be added up; wanted one scale")
    return scale * (math.sqrt(rank) if new.rslora else rank)


def _usual(values: Mapping[str, T]) -> T:
    """The most frequent value."""
    listed = list(values.values())
    return max(listed, key=listed.count)
