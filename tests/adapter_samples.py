"""Adapters that are far from fresh, for tests that attach them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graftory import Adapter, AdapterConfig, BottleneckConfig, LoraConfig, TaskInfo, new_adapter
from graftory.adapters import AdaptedModel, Row
from graftory.config import Placement

PLACEMENTS: tuple[Placement, ...] = ("houlsby", "pfeiffer", "parallel")


def task(labels: int) -> TaskInfo:
    return TaskInfo(f"task{labels}", "classification", tuple(f"label {i}" for i in range(labels)))


def shaken(adapter: Adapter, seed: int = 0) -> Adapter:
    """The adapter with random weights everywhere, as if trained, so that its update is far from zero; bits stay."""
    generator = torch.Generator().manual_seed(seed)
    noise = {key: 0.2 * torch.randn(value.shape, generator=generator) for key, value in adapter.tensors.items()}
    return replace(
        adapter,
        tensors={
            key: value + noise[key] if value.is_floating_point() else value for key, value in adapter.tensors.items()
        },
    )


def make(model: Any, config: AdapterConfig, labels: int = 0, seed: int = 0) -> Adapter:
    return shaken(new_adapter(model, config, task=task(labels) if labels else None), seed)


def logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**batch).logits
    return output


def eight(model: Any) -> dict[str, Adapter]:
    """LoRA of two ranks, bottlenecks, heads of different sizes, and one without a head."""
    return {
        "small": make(model, LoraConfig(rank=2), labels=6, seed=1),
        "large": make(model, LoraConfig(rank=5, alpha=7, rslora=True, targets=("all",)), labels=3, seed=2),
        "neck": make(model, BottleneckConfig(size=6, activation="gelu"), labels=2, seed=3),
        "headless": make(model, BottleneckConfig(size=3, placement="houlsby"), seed=4),
        "beside": make(model, BottleneckConfig(size=4, placement="parallel", scale=2.0), labels=5, seed=5),
    }


ROWS: Sequence[Row] = ("small", None, "large", "neck", "headless", None, "beside", "small")


def mixed_as_single(
    adapted: AdaptedModel, rows: Sequence[Row], batch: dict[str, Tensor], tolerance: float
) -> dict[str, Tensor]:
    """Check that a mixed batch gives each row's logits, and all gradients, as the rows one by one; the gradients."""
    with adapted.route(rows):
        mixed = logits(adapted, batch)
        mixed.square().sum().backward()
    together = {name: weight.grad for name, weight in adapted.named_parameters() if weight.grad is not None}
    adapted.zero_grad()
    for i, row in enumerate(rows):
        with adapted.route([row]):
            one = logits(adapted, {key: value[i : i + 1] for key, value in batch.items()})
        torch.testing.assert_close(mixed[i], one[0], atol=tolerance, rtol=tolerance)
        if row is not None:
            one.square().sum().backward()
    alone = {name: weight.grad for name, weight in adapted.named_parameters() if weight.grad is not None}
    assert together.keys() == alone.keys()
    for name, grad in together.items():
        torch.testing.assert_close(grad, alone[name], atol=tolerance, rtol=10 * tolerance)
    return together
