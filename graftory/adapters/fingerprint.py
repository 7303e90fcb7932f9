"""Tell base models apart whatever they are called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftory.adapter import BaseModel
from graftory.adapters.architectures import HEADS
from graftory.schema import canonical

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOT_BACKBONE = {*HEADS, "lm_head", "cls", "qa_outputs", "pooler"}
_PIECE = 1 << 20
"""Numbers that are rounded at a time: an embedding is a large part of a small model."""
_SET_BY_CALLS = ("padding", "truncation")


def base_of(
    model: PreTrainedModel,
    id: str | None = None,  # noqa: A002
    revision: str | None = None,
    tokenizer: Any = None,
) -> BaseModel:
    """Describe a loaded model so that an adapter can say what it belongs to.

    Only the backbone counts: heads and pooler may be freshly initialised and differ from load to load.
    `config_hash` is taken over the architecture and the names and shapes of all backbone weights,
    `weights_hash` over their values rounded to bfloat16, so fp32 and bf16 copies of one model agree.

    Args:
        model: The model, with no adapter attached.
        id: What users load it by; the model's own `name_or_path` if not given.
        revision: Commit of the model on its hub, if known.
        tokenizer: Its tokenizer, if it has one.
    """
    architecture = model.config.model_type
    config, weights = hashes_of(architecture, _backbone(model))
    return BaseModel(
        id=id or model.config._name_or_path or architecture,
        revision=revision,
        architecture=architecture,
        config_hash=config,
        weights_hash=weights,
        tokenizer_hash=None if tokenizer is None else tokenizer_hash(tokenizer),
    )


def hashes_of(architecture: str, named: Iterable[tuple[str, Tensor]]) -> tuple[str, str]:
    """`config_hash` and `weights_hash` of a backbone; one tensor at a time is looked at.

    Args:
        architecture: `config.model_type`.
        named: The tensors of the backbone by `backbone_names`, in that order.
    """
    shapes, weights = [], hashlib.sha256()
    for name, tensor in named:
        shapes.append([name, list(tensor.shape)])
        weights.update(name.encode())
        for piece in tensor.detach().reshape(-1).split(_PIECE):
            weights.update(piece.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy().data)
    config = hashlib.sha256(canonical({"architecture": architecture, "shapes": shapes}))
    return f"sha256:{config.hexdigest()}", f"sha256:{weights.hexdigest()}"


def backbone_names(model: PreTrainedModel) -> list[str]:
    """The parameters that fingerprints are taken of, by their names in the bare backbone, in order."""
    names = sorted(name for name, _ in model.base_model.named_parameters())
    return [name for name in names if name.split(".")[0] not in _NOT_BACKBONE]


def tokenizer_hash(tokenizer: Any) -> str:
    """Tell tokenizers apart: the sha256 of everything that turns text into numbers.

    Of a fast tokenizer it is taken over its whole pipeline without padding and truncation, which every
    call sets anew; of a slow one over its class, vocabulary and special tokens.

    Args:
        tokenizer: A tokenizer of transformers.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        pipeline = json.loads(backend.to_str())
        content = {key: value for key, value in pipeline.items() if key not in _SET_BY_CALLS}
    else:
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "special": special}
    return f"sha256:{hashlib.sha256(canonical(content)).hexdigest()}"


def _backbone(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    parameters = dict(model.base_model.named_parameters())
    return ((name, parameters[name]) for name in backbone_names(model))
