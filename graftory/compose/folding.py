"""What becomes of a module's weight and bias when an adapter is folded in: one function a method, all in fp64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.config import AdapterConfig, BitfitConfig, DoraConfig, Ia3Config, LoraConfig, LowRankConfig
from graftory.errors import MergeError, ShapeError


@dataclass(frozen=True, slots=True)
class Linear:
    """The numbers of a module.

    Attributes:
        weight: W [d_out, d_in], or the gain [d] of a norm.
        bias: [d_out]; None if it has none.
    """

    weight: Tensor
    bias: Tensor | None


def lora(adapter: Adapter, path: str, base: Linear) -> Linear:
    """W + s B A."""
    return Linear(_sum(path, base.weight, _product(adapter, path)), base.bias)


def dora(adapter: Adapter, path: str, base: Linear) -> Linear:
    """(m / n) ⊙ (W + s B A), n the norms of its rows."""
    weight = _sum(path, base.weight, _product(adapter, path))
    magnitude = adapter.tensors[f"{path}.{DoraConfig.parts[2]}"].double()
    return Linear((magnitude / torch.linalg.vector_norm(weight, dim=1))[:, None] * weight, base.bias)


def ia3(adapter: Adapter, path: str, base: Linear) -> Linear:
    """W and b with their rows scaled by l, or W with its columns."""
    config = cast(Ia3Config, adapter.spec.config)
    vector = adapter.tensors[f"{path}.{Ia3Config.parts[0]}"].double()
    side = 1 if path in config.feedforward else 0
    if vector.numel() != base.weight.shape[side]:
        raise ShapeError(f"{path}: a vector of {vector.numel()} for a weight of {tuple(base.weight.shape)}")
    scaled = None if base.bias is None else base.bias if side else base.bias * vector[:, 0]
    return Linear(base.weight * vector, scaled)


def bitfit(adapter: Adapter, path: str, base: Linear) -> Linear:
    """b + δ."""
    if base.bias is None:
        raise MergeError(f"{path} has no bias, so it cannot hold a bitfit update; load the base it was trained on")
    return Linear(base.weight, _sum(path, base.bias, adapter.tensors[f"{path}.{BitfitConfig.parts[0]}"].double()))


FOLDS: Mapping[type[AdapterConfig], Callable[[Adapter, str, Linear], Linear]] = {
    LoraConfig: lora,
    DoraConfig: dora,
    Ia3Config: ia3,
    BitfitConfig: bitfit,
}
"""The methods whose update is a change of base weights."""


def _product(adapter: Adapter, path: str) -> Tensor:
    config = cast(LowRankConfig, adapter.spec.config)
    a, b = adapter.tensors[f"{path}.lora_A.weight"], adapter.tensors[f"{path}.lora_B.weight"]
    return config.scale_of(path) * (b.double() @ a.double())


def _sum(path: str, old: Tensor, update: Tensor) -> Tensor:
    if update.shape != old.shape:
        raise ShapeError(f"{path}: an update of {tuple(update.shape)} for a weight of {tuple(old.shape)}")
    return old + update.to(old.device)
