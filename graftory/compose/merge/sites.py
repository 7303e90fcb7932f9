"""What methods in delta space share: the updates of all adapters, module by module, whatever kind they are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from graftory.compose.merge.base import Body, union_of_targets
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.lora import lora_body, lora_deltas
from graftory.errors import MergeError

_DELTAS: Mapping[str, Callable[[Body], dict[str, Delta]]] = {"lora": lora_deltas}
"""How adapters of each linear method become updates. What is not linear has no ΔW and no row here."""

LINEAR_METHODS = tuple(_DELTAS)
"""Adapter methods that methods in delta space accept."""


@dataclass(frozen=True, slots=True)
class Site:
    """One module and the updates that adapters make to it, in fp32. An adapter that leaves it alone is not there.

    Attributes:
        path: The module.
        deltas: At least one, all of one shape.
        weights: One each, none of them 0.
        bodies: The adapters, for methods that look at more than the updates.
    """

    path: str
    deltas: tuple[Delta, ...]
    weights: tuple[float, ...]
    bodies: tuple[Body, ...]


def taking_part(bodies: Sequence[Body], weights: Sequence[float]) -> tuple[list[Body], list[float]]:
    """The adapters whose weight is not 0, and those weights.

    Raises:
        MergeError: If there are none.
    """
    left = [(body, weight) for body, weight in zip(bodies, weights, strict=True) if weight != 0]
    if not left:
        raise MergeError("all weights are 0: nothing is left to merge; give at least one weight other than 0")
    return [body for body, _ in left], [weight for _, weight in left]


def merge_sites(bodies: Sequence[Body], weights: Sequence[float], merged: Callable[[Site], Delta]) -> Body:
    """Merge module by module, so that what a method needs beside the factors is there for one module at a time.

    Args:
        bodies: Adapters of linear methods; their ranks, scales and targets may differ.
        weights: One each. Adapters of weight 0 take no part.
        merged: Merges one module.

    Returns:
        A LoRA adapter of scale 1 in fp32.

    Raises:
        MergeError: If all weights are 0, two adapters disagree on a module's shape, or a weight is not finite.
    """
    chosen, factors = taking_part(bodies, weights)
    deltas = [_DELTAS[body.config.method](body) for body in chosen]
    found: dict[str, Delta] = {}
    for path in union_of_targets(chosen):
        here = [number for number, one in enumerate(deltas) if path in one]
        site = Site(
            path,
            tuple(deltas[number][path] for number in here),
            tuple(factors[number] for number in here),
            tuple(chosen[number] for number in here),
        )
        _check(site)
        found[path] = _at_least_one(merged(site).float())
    return lora_body(found, max(getattr(body.config, "dropout", 0.0) for body in chosen))


def _check(site: Site) -> None:
    shapes = {delta.shape for delta in site.deltas}
    if len(shapes) > 1:
        raise MergeError(f"{site.path}: updates of different shapes {sorted(shapes)}; are they of one base model?")
    for delta, body in zip(site.deltas, site.bodies, strict=True):
        if not all(bool(torch.isfinite(factor).all()) for factor in (delta.left, delta.right)):
            raise MergeError(
                f"{site.path}: {body.name} has NaN or infinite weights, which cannot be merged; train the adapter again"
            )


def _at_least_one(delta: Delta) -> Delta:
    """An update of nothing as factors of width 1: a LoRA has no rank 0."""
    if delta.rank:
        return delta
    return Delta(delta.left.new_zeros(delta.shape[0], 1), delta.right.new_zeros(1, delta.shape[1]))
