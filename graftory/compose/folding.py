"""What becomes of a module's weight and bias when an adapter is folded in: one function a method, all in fp64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.compose.merge.originals import Original
from graftory.compose.merge.peft_kinds import PEFT_DELTAS
from graftory.config import (
    AdapterConfig,
    BitfitConfig,
    DoraConfig,
    Ia3Config,
    KronaConfig,
    LoraBiasConfig,
    LoraConfig,
    LowRankConfig,
    UpdateConfig,
)
from graftory.config.peft import LnTuningConfig, PeftConfig
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


def lora_bias(adapter: Adapter, path: str, base: Linear) -> Linear:
    """W + s B A, and b' + s c."""
    config = cast(LoraBiasConfig, adapter.spec.config)
    part = {name: adapter.tensors[f"{path}.{name}"].double() for name in config.parts_at(path)}
    own, more = (part.get(name) for name in (config.parts[4 if path in config.bias_only else 3], config.parts[2]))
    bias = base.bias if own is None else own.to(base.weight)
    if more is not None:
        if bias is None:
            raise MergeError(f"{path} has no bias, so it cannot hold lora_B's; serve the adapter with attach()")
        bias = _sum(path, bias, config.scale_of(path) * more)
    if own is not None and (base.bias is None or own.shape != base.bias.shape):
        raise ShapeError(f"{path}: a bias of {tuple(own.shape)} where the base has another")
    if path in config.bias_only:
        return Linear(base.weight, bias)
    return Linear(_sum(path, base.weight, _product(adapter, path)), bias)


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


def update(adapter: Adapter, path: str, base: Linear) -> Linear:
    """W + B A + diag(p) W + W diag(q), and b + Δb."""
    config = cast(UpdateConfig, adapter.spec.config)
    part = {name: adapter.tensors[f"{path}.{name}"].double() for name in config.parts_at(path)}
    more = part[UpdateConfig.parts[4]]
    if base.bias is None and bool(more.any()):
        raise MergeError(f"{path} has no bias, so it cannot hold what this merge adds to one; serve it with attach()")
    bias = None if base.bias is None else _sum(path, base.bias, more)
    if path in config.bias_only:
        return Linear(base.weight, bias)
    a, b, rows, columns = (part[name] for name in UpdateConfig.parts[:4])
    weight = _sum(path, base.weight, b @ a)
    return Linear(weight + rows[:, None] * base.weight + base.weight * columns, bias)


def krona(adapter: Adapter, path: str, base: Linear) -> Linear:
    """W + s A ⊗ B."""
    config = cast(KronaConfig, adapter.spec.config)
    a, b = (adapter.tensors[f"{path}.{part}"].double() for part in KronaConfig.parts)
    return Linear(_sum(path, base.weight, config.strength * torch.kron(a, b)), base.bias)


def peft(adapter: Adapter, path: str, base: Linear) -> Linear:
    """W + ΔW of a method that PEFT runs."""
    config = cast(PeftConfig, adapter.spec.config)
    tensors = {key: value.double() for key, value in adapter.body_tensors().items()}
    delta = PEFT_DELTAS[type(config)](config, path, tensors, lambda _: Original(base.weight, base.bias))
    return Linear(_sum(path, base.weight, delta.dense()), base.bias)


def ln_tuning(adapter: Adapter, path: str, base: Linear) -> Linear:
    """The adapter's own gain and bias of a norm."""
    gain, bias = (adapter.tensors.get(f"{path}.{part}") for part in LnTuningConfig.parts)
    if gain is None or gain.shape != base.weight.shape or (bias is None) is not (base.bias is None):
        raise ShapeError(f"{path}: the gain or bias does not fit a norm of {tuple(base.weight.shape)}")
    return Linear(gain.to(base.weight), None if bias is None else bias.to(base.weight))


FOLDS: Mapping[type[AdapterConfig], Callable[[Adapter, str, Linear], Linear]] = {
    LoraConfig: lora,
    LoraBiasConfig: lora_bias,
    DoraConfig: dora,
    Ia3Config: ia3,
    BitfitConfig: bitfit,
    UpdateConfig: update,
    KronaConfig: krona,
    **dict.fromkeys(PEFT_DELTAS, peft),
    LnTuningConfig: ln_tuning,
}
"""The methods whose update is a change of base weights."""

_BY_ROWS: Mapping[type[AdapterConfig], tuple[str, ...]] = {
    LoraConfig: ("lora_B.weight",),
    DoraConfig: ("lora_B.weight", "lora_magnitude_vector"),
    Ia3Config: Ia3Config.parts,
    BitfitConfig: BitfitConfig.parts,
    UpdateConfig: ("bias_delta", "lora_B.weight", "row_scale"),
}
"""Methods that change each row of a weight, and each number of a bias, by itself: their tensors with a row for each.
A method without a row here is folded into the whole weight at once."""


def by_rows(adapter: Adapter, path: str, start: int, stop: int) -> Adapter | None:
    """What of an adapter belongs to some outputs of a module; None if its method needs all of them at once."""
    parts = _BY_ROWS.get(type(adapter.spec.config))
    if parts is None:
        return None
    config = adapter.spec.config
    if isinstance(config, Ia3Config) and path in config.feedforward:
        return adapter  # its vector goes along the inputs
    keys = [f"{path}.{part}" for part in parts if f"{path}.{part}" in adapter.tensors]
    cut = {key: adapter.tensors[key][start:stop] for key in keys}
    return replace(adapter, tensors={**adapter.tensors, **cut})


def outputs_of(adapter: Adapter, path: str) -> int | None:
    """How many outputs an adapter expects of a module; None if it does not say."""
    parts = _BY_ROWS.get(type(adapter.spec.config), ())
    config = adapter.spec.config
    if not parts or (isinstance(config, Ia3Config) and path in config.feedforward):
        return None
    return adapter.tensors[f"{path}.{parts[0]}"].shape[0]


def _product(adapter: Adapter, path: str) -> Tensor:
    config = cast(LowRankConfig, adapter.spec.config)
    a, b = adapter.tensors[f"{path}.lora_A.weight"], adapter.tensors[f"{path}.lora_B.weight"]
    return config.scale_of(path) * (b.double() @ a.double())


def _sum(path: str, old: Tensor, update: Tensor) -> Tensor:
    if update.shape != old.shape:
        raise ShapeError(f"{path}: an update of {tuple(update.shape)} for a weight of {tuple(old.shape)}")
    return old + update.to(old.device)
