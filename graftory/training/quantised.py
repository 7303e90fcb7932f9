"""Bases whose weights are quantised: QLoRA trains LoRA beside them, LoftQ starts it from what quantising has lost.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314) needs nothing of its own: the frozen layer multiplies by Q, what 4 bits
are left of W, and the update is added in full precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graftory.adapter import Adapter
from graftory.adapters import new_adapter
from graftory.adapters.architectures import linear_widths, module_at
from graftory.config import LoraConfig
from graftory.errors import BaseMismatchError, ConfigError
from graftory.training.base import LoadedBase

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether a model has weights that stand for others."""
    return getattr(model, "is_quantized", False) or any(not each.is_floating_point() for each in model.parameters())


def weight_in_force(module: nn.Module) -> Tensor:
    """Q [d_out, d_in] in fp32: what a linear layer multiplies by, whoever has quantised it, as it does it itself."""
    inputs, _ = linear_widths(module)
    device = next(module.parameters()).device
    with torch.no_grad():
        rows: Tensor = module(torch.eye(inputs, device=device)) - module(torch.zeros(1, inputs, device=device))
    return rows.T.float()


def loftq(loaded: LoadedBase, original: PreTrainedModel, config: LoraConfig) -> Adapter:
    """The LoRA that gives a quantised base back most of what it has lost: s B A ≈ W − Q (LoftQ, Li et al. 2023,
    arXiv:2310.08659).

    The paper takes turns, quantising W − s B A and decomposing what is left. A quantised base is given here, so Q stays
    and it is one turn: with W − Q = U Σ Vᵀ, A = Σ_r^½ V_rᵀ and s B = U_r Σ_r^½, the best of rank r in the Frobenius
    norm. Such an adapter is no longer zero at the start.

    Args:
        loaded: The quantised base.
        original: The model before it was quantised.
        config: Rank, scale and targets.

    Raises:
        ConfigError: If the base is not quantised.
        BaseMismatchError: If the original is another architecture or of other widths.
    """
    if not is_quantised(loaded.model):
        raise ConfigError(f"{loaded.base.id!r} is not quantised, so there is nothing for LoftQ to give back")
    fresh = new_adapter(loaded.model, config, base=loaded.base)
    resolved = fresh.spec.config
    assert isinstance(resolved, LoraConfig)
    tensors: dict[str, Tensor] = {}
    for path in resolved.targets:
        whole, rounded = _weight_of(original, path), weight_in_force(module_at(loaded.model, path)[1]).cpu()
        if whole.shape != rounded.shape:
            got, wanted = tuple(whole.shape), tuple(rounded.shape)
            raise BaseMismatchError(f"{path} of the original is {got}, of the quantised base {wanted}; give its own")
        tensors |= _factors(whole - rounded, path, resolved)
    return Adapter(fresh.spec, {**fresh.tensors, **tensors})


def _weight_of(original: PreTrainedModel, path: str) -> Tensor:
    try:
        return weight_in_force(module_at(original, path)[1]).cpu()
    except BaseMismatchError as error:
        raise BaseMismatchError(f"the original is another model than what was quantised: {error}") from error


def _factors(lost: Tensor, path: str, config: LoraConfig) -> dict[str, Tensor]:
    rank = config.rank_of(path)
    left, values, right = torch.linalg.svd(lost.double(), full_matrices=False)
    root = values[:rank].sqrt()
    a, b = root[:, None] * right[:rank], left[:, :rank] * root / config.scale_of(path)
    return {f"{path}.lora_A.weight": a.float().contiguous(), f"{path}.lora_B.weight": b.float().contiguous()}
