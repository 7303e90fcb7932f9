"""Several processes that train together, as `torchrun` or `accelerate launch` start them: who is first, and sums.

All do the same on parts of the rows. Only the first writes. In one process all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from graftory.errors import ConfigError

T = TypeVar("T")
_PATIENCE = timedelta(days=1)
"""The others wait while the first evaluates."""


def size() -> int:
    """How many processes there are."""
    return 1 if _group() is None else distributed.get_world_size()


def number() -> int:
    """Which of them this is, from 0."""
    return 0 if _group() is None else distributed.get_rank()


def is_first() -> bool:
    """Whether this is the one that writes."""
    return number() == 0


def wait() -> None:
    """Until all are here."""
    if _group() is not None:
        distributed.barrier()


def from_first(value: T) -> T:
    """What the first has in its place."""
    if _group() is None:
        return value
    held: list[Any] = [value]
    distributed.broadcast_object_list(held, src=0)
    found: T = held[0]
    return found


@torch.no_grad()
def add_up(tensors: Sequence[Tensor]) -> None:
    """Put the sums over all processes in the tensors' places; one exchange for all of them."""
    if _group() is None or not tensors:
        return
    for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
        own = [tensor for tensor in tensors if tensor.dtype == kind]
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in own])
        distributed.all_reduce(flat)
        for tensor, part in zip(own, flat.split([tensor.numel() for tensor in own]), strict=True):
            tensor.copy_(part.view_as(tensor))


def mean_rows(rows: Tensor) -> Tensor:
    """The mean over the rows of all processes, [rows, ...] to [...]."""
    if _group() is None:
        return rows.mean(0)
    total, count = rows.sum(0), torch.tensor([float(len(rows))], device=rows.device)
    add_up([total, count])
    return total / count.to(total.dtype)


def mean_gradients(weights: Sequence[torch.nn.Parameter]) -> None:
    """Put the means over all processes in the gradients' places; a weight that has one nowhere gets none."""
    if _group() is None or not weights:
        return
    has = torch.tensor([float(weight.grad is not None) for weight in weights], device=weights[0].device)
    add_up([has])
    learnt = [weight for weight, count in zip(weights, has.tolist(), strict=True) if count]
    for weight in learnt:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    gradients = [weight.grad for weight in learnt if weight.grad is not None]
    add_up(gradients)
    for gradient in gradients:
        gradient /= size()


def on_cpu() -> bool:
    """Whether there is nothing faster. Accelerate, and so transformers, joins processes on CPUs only if told."""
    return not torch.accelerator.is_available()


@cache
def _group() -> Any:
    """The state of accelerate, which joins the processes when it is first asked for; None in a single process.

    Raises:
        ConfigError: If they were started together and cannot be joined.
    """
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted < 2:
        return None
    from accelerate import PartialState  # type: ignore[import-untyped]

    state = PartialState(cpu=on_cpu(), timeout=_PATIENCE)
    if state.num_processes != wanted:
        raise ConfigError(
            f"{wanted} processes were started, and accelerate has joined {state.num_processes}; start them with "
            "torchrun or accelerate launch"
        )
    return state
