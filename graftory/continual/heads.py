"""Heads of earlier tasks while another one is learnt: attached under names, kept under others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from graftory.adapter import Adapter
from graftory.continual.strategies.base import Context, Kept
from graftory.training.company import head_of

_PREFIX = "head of "


def attached_as(task: str) -> str:
    """The name under which a task's head is attached. No adapter of a hub can have it."""
    return f"{_PREFIX}{task}"


def companions(heads: Mapping[str, Adapter], tasks: Iterable[str]) -> dict[str, Adapter]:
    """The heads of tasks, without bodies, by the names they are attached under; tasks without a head are left out."""
    return {attached_as(task): head_of(heads[task]) for task in tasks if heads[task].head_tensors()}


def earlier_heads(context: Context) -> dict[str, Adapter]:
    """The present heads of all tasks learnt so far, as `companions`."""
    return companions({task: context.head(task) for task in context.earlier()}, context.earlier())


def kept_heads(heads: Mapping[str, Adapter]) -> Kept:
    """Heads as they are to be kept, where `Context.head` looks for them."""
    return Kept(
        {
            f"heads/{name.removeprefix(_PREFIX)}/{key}": tensor
            for name, head in heads.items()
            for key, tensor in head.tensors.items()
        }
    )
