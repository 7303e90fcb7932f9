"""Make a fresh adapter, as data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from graftory.adapter import Adapter, AdapterSpec, BaseModel, Lineage, TaskInfo
from graftory.adapters.architectures import head_paths
from graftory.adapters.fingerprint import base_of
from graftory.adapters.head import initial_head
from graftory.adapters.table import METHODS
from graftory.config import AdapterConfig
from graftory.errors import UnsupportedAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def new_adapter(
    model: PreTrainedModel,
    config: AdapterConfig,
    *,
    task: TaskInfo | None = None,
    base: BaseModel | None = None,
) -> Adapter:
    """A fresh adapter for a model: its update is exactly zero, its tensors depend on `init_seed` alone.

    Args:
        model: The base model, with no adapter attached.
        config: The method's configuration; targets may be groups or ends of paths, and become explicit.
        task: What it will be trained for; a task with outputs gets a fresh head if the model has heads.
        base: The description of `model`; taken from it if not given.

    Raises:
        UnsupportedAdapterError: If the method has no sites on this architecture or a target fits nothing.
    """
    method = METHODS.get(config.method)
    if method is None:
        raise UnsupportedAdapterError(f"unknown method {config.method!r}; known: {', '.join(METHODS)}")
    seed = 0 if config.init_seed is None else config.init_seed
    config = method.fill(model, replace(config, targets=method.resolve(model, config), init_seed=seed))
    generator = torch.Generator().manual_seed(seed)
    tensors = method.whole(model, config, generator) if method.whole else {}
    for path in config.targets if method.whole is None else ():
        for part, tensor in method.initial(model, path, config, generator).items():
            tensors[f"{path}.{part}"] = tensor
    heads = head_paths(model) if task and task.outputs else ()
    if task and heads:
        tensors |= initial_head(model, task.outputs, generator)
        task = replace(task, head=heads)
    spec = AdapterSpec(base=base or base_of(model), config=config, task=task, lineage=Lineage(process="created"))
    return Adapter(spec, tensors)
