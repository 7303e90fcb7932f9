"""Tell base models apart whatever they are called."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftory.adapter import BaseModel
from graftory.adapters.architectures import HEADS
from graftory.schema import canonical

_NOT_BACKBONE = {*HEADS, "lm_head", "cls", "qa_outputs", "pooler"}


def base_of(model: PreTrainedModel, id: str | None = None, revision: str | None = None) -> BaseModel:  # noqa: A002
    """Describe a loaded model so that an adapter can say what it belongs to.

    Only the backbone counts: heads and pooler may be freshly initialised and differ from load to load.
    `config_hash` is taken over the architecture and the names and shapes of all backbone weights,
    `weights_hash` over their values rounded to bfloat16, so fp32 and bf16 copies of one model agree.

    Args:
        model: The model, with no adapter attached.
        id: What users load it by; the model's own `name_or_path` if not given.
        revision: Commit of the model on its hub, if known.
    """
    shapes, weights = [], hashlib.sha256()
    for name, tensor in _backbone(model):
        shapes.append([name, list(tensor.shape)])
        weights.update(name.encode())
        weights.update(tensor.detach().to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy().data)
    architecture = model.config.model_type
    config = hashlib.sha256(canonical({"architecture": architecture, "shapes": shapes}))
    return BaseModel(
        id=id or model.config._name_or_path or architecture,
        revision=revision,
        architecture=architecture,
        config_hash=f"sha256:{config.hexdigest()}",
        weights_hash=f"sha256:{weights.hexdigest()}",
    )


def _backbone(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in sorted(model.base_model.named_parameters()):
        if name.split(".")[0] not in _NOT_BACKBONE:
            yield name, tensor
