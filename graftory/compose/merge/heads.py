"""What happens to the heads, bases and tasks of merged adapters, whatever the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from graftory.adapter import Adapter, BaseModel, TaskInfo
from graftory.errors import BaseMismatchError


def merge_heads(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[TaskInfo | None, dict[str, Tensor]]:
    """The weighted mean Σ w h / Σ w of the heads where they mean the same, else no head at all.

    Heads mean the same if kind and ordered labels agree. Otherwise the merged adapter has no task and
    each task keeps its own head: `route(["merged"], heads=["trec"])`.
    """
    tasks = [adapter.spec.task for adapter in adapters]
    first, total = tasks[0], sum(weights)
    if first is None or any(task is None or not _same_meaning(task, first) for task in tasks):
        return None, {}
    names = list(dict.fromkeys(task.name for task in tasks if task))
    merged = replace(first, name="+".join(names), max_length=max(task.max_length for task in tasks if task))
    heads = [adapter.head_tensors() for adapter in adapters]
    shapes = [{key: tensor.shape for key, tensor in head.items()} for head in heads]
    if any(shape != shapes[0] for shape in shapes) or (heads[0] and total <= 0):
        return None, {}
    tensors = {
        key: torch.stack([head[key].double() * (weight / total) for head, weight in zip(heads, weights, strict=True)])
        .sum(0)
        .float()
        for key in heads[0]
    }
    return merged, tensors


def common_base(bases: Sequence[BaseModel]) -> BaseModel:
    """The one base of all, described as fully as any of them does.

    Weights decide where both sides know them; a name or a revision counts only where they do not.

    Raises:
        BaseMismatchError: If two of them are different models.
    """
    best = max(bases, key=lambda base: (base.weights_hash is not None, base.config_hash is not None))
    for base in bases:
        by_hash = None not in (base.weights_hash, best.weights_hash)
        same = base.weights_hash == best.weights_hash if by_hash else base.id == best.id
        if base.config_hash and best.config_hash:
            same = same and base.config_hash == best.config_hash
        if not same:
            raise BaseMismatchError(
                f"adapters of different base models: {_describe(best)} and {_describe(base)}; "
                "merge only adapters of one base"
            )
    return best


def _same_meaning(task: TaskInfo, other: TaskInfo) -> bool:
    same = (task.kind, task.labels, task.head) == (other.kind, other.labels, other.head)
    return same and (bool(task.head) or task.template == other.template)


def _describe(base: BaseModel) -> str:
    digest = base.weights_hash or base.config_hash
    return f"{base.id} (weights {digest[:19]}…)" if digest else f"{base.id} (weights unknown)"
