"""What becomes of a module's weight and bias when an adapter is folded in: in fp64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.compose.merge.kinds import KINDS, delta_in
from graftory.compose.merge.originals import Original
from graftory.config import (
    AdapterConfig,
    BitfitConfig,
    DoraConfig,
    Ia3Config,
    LoraConfig,
    UpdateConfig,
)
from graftory.config.peft import LnTuningConfig
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


def update(adapter: Adapter, path: str, base: Linear) -> Linear:
    """W + ΔW and b + Δb, by the exact form in which updates are merged.

    Raises:
        MergeError: If a bias is added where the base has none, or the update is of another base.
        ShapeError: If it does not fit.
    """
    config = adapter.spec.config
    original = Original(base.weight, base.bias)
    delta = delta_in(torch.float64, config, path, adapter.tensors, lambda _: original)
    weight = _sum(path, base.weight, delta.dense()) if delta.changes_weight else base.weight
    if delta.bias is None:
        return Linear(weight, base.bias)
    if base.bias is not None:
        return Linear(weight, _sum(path, base.bias, delta.bias))
    if bool(delta.bias.any()):
        raise MergeError(
            f"{path} has no bias, so it cannot hold what the {config.method} adapter adds to one; load the base it was "
            "made on, or serve it with attach()"
        )
    return Linear(weight, None)


def ln_tuning(adapter: Adapter, path: str, base: Linear) -> Linear:
    """The adapter's own gain and bias of a norm."""
    gain, bias = (adapter.tensors.get(f"{path}.{part}") for part in LnTuningConfig.parts)
    if gain is None or gain.shape != base.weight.shape or (bias is None) is not (base.bias is None):
        raise ShapeError(f"{path}: the gain or bias does not fit a norm of {tuple(base.weight.shape)}")
    return Linear(gain.to(base.weight), None if bias is None else bias.to(base.weight))


FOLDS: Mapping[type[AdapterConfig], Callable[[Adapter, str, Linear], Linear]] = {
    **dict.fromkeys(KINDS, update),
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


def _sum(path: str, old: Tensor, update: Tensor) -> Tensor:
    if update.shape != old.shape:
        raise ShapeError(f"{path}: an update of {tuple(update.shape)} for a weight of {tuple(old.shape)}")
    return old + update.to(old.device)
