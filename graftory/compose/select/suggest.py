"""Which adapters to compose for a new task, with reasons: likeness of examples and of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from graftory.adapter import Adapter
from graftory.compose.merge.base import body_of
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.lora import lora_deltas
from graftory.compose.select.base import Domain
from graftory.compose.select.clustering import by_clustering
from graftory.compose.select.similarity import similarities
from graftory.config import LoraConfig
from graftory.settings import SelectSettings

REDUNDANT = 0.95
"""From this cosine of two updates on, one of the two adds little."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What speaks for an adapter as a parent.

    Attributes:
        name: The adapter.
        suggested: Whether to take it.
        share: Share of the task's examples that fall into its clusters.
        similarity: Mean cosine of the task's examples and those of its own task.
        nearest: The other adapter whose update is most like its own; None if that cannot be told.
        weights: Cosine of the two updates.
        reasons: In words.
    """

    name: str
    suggested: bool
    share: float
    similarity: float
    nearest: str | None
    weights: float | None
    reasons: tuple[str, ...]


def suggest(
    adapters: Mapping[str, Adapter],
    domains: Sequence[Domain],
    examples: Tensor,
    labels: Sequence[str] = (),
    settings: SelectSettings | None = None,
    *,
    seed: int = 0,
) -> tuple[Suggestion, ...]:
    """Judge adapters as parents for a new task, best first.

    One is suggested if enough of the examples fall into its clusters, or its examples are similar enough (both
    as in AdapterSoup), and no better one that is suggested has nearly the same update.

    Args:
        adapters: By name.
        domains: Features of examples of what each was trained on.
        examples: Features of examples of the new task.
        labels: Labels of the new task.
        settings: Limits.
        seed: For the clustering.
    """
    settings = settings or SelectSettings()
    shares = by_clustering(domains, examples, settings, seed)
    cosines = similarities(domains, examples)
    order = sorted(adapters, key=lambda name: (-shares[name], -cosines[name]))
    taken: list[str] = []
    found = []
    for name in order:
        reasons = [f"{shares[name]:.0%} of the examples in its clusters", f"mean cosine {cosines[name]:.2f}"]
        task = adapters[name].spec.task
        if task is not None and labels and tuple(labels) == task.labels:
            reasons.append("has the same labels, so its head serves too")
        nearest, weights = _nearest(name, adapters)
        twin = next((one for one in taken if (cosine(adapters[name], adapters[one]) or 0) >= REDUNDANT), None)
        if twin is not None:
            reasons.append(f"its update is nearly that of {twin}")
        fits = shares[name] >= settings.min_share or cosines[name] > settings.threshold
        suggested = fits and twin is None and len(taken) < settings.most
        if suggested:
            taken.append(name)
        found.append(Suggestion(name, suggested, shares[name], cosines[name], nearest, weights, tuple(reasons)))
    return tuple(found)


def cosine(left: Adapter, right: Adapter) -> float | None:
    """The cosine of two LoRA updates over all modules, from the factors: <BA, B'A'> = Σ (BᵀB') ∘ (AA'ᵀ), in float64.

    None for other methods, whose tensors mean nothing beside another adapter's, and where an update is zero.
    """
    if not isinstance(left.spec.config, LoraConfig) or not isinstance(right.spec.config, LoraConfig):
        return None
    first, second = lora_deltas(body_of(left, 0)), lora_deltas(body_of(right, 1))

    def inner(one: dict[str, Delta], other: dict[str, Delta]) -> float:
        total = 0.0
        for path in one.keys() & other.keys():
            mine, its = one[path].double(), other[path].double()
            total += float(((mine.left.T @ its.left) * (mine.right @ its.right.T)).sum())
        return total

    scale = math.sqrt(inner(first, first) * inner(second, second))
    return inner(first, second) / scale if scale else None


def _nearest(name: str, adapters: Mapping[str, Adapter]) -> tuple[str | None, float | None]:
    found = [(cosine(adapters[name], other), key) for key, other in adapters.items() if key != name]
    known = [(value, key) for value, key in found if value is not None]
    value, key = max(known, default=(None, None))
    return key, value
