"""Weights of `lorahub`: a few labelled examples, no gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftory.adapter import Adapter, TaskInfo
from graftory.compose.merge import merge
from graftory.compose.merge.lorahub import LorahubParameters
from graftory.data import Rows, TaskFile
from graftory.errors import ConfigError, MergeError
from graftory.training import LoadedBase
from graftory.training.prediction import HEADED, Query, score

_FIRST_STEP = 0.5
"""COBYLA's first step: each weight alone at one half."""


@dataclass(frozen=True, slots=True)
class Tried:
    """The best weights that were tried.

    Attributes:
        weights: One for each adapter.
        loss: The mean loss of the rows with them.
        objective: That plus the penalty.
        base_loss: The loss of the bare base, where the search starts.
        tries: How many weights were tried.
    """

    weights: tuple[float, ...]
    loss: float
    objective: float
    base_loss: float
    tries: int


def tune_weights(
    loaded: LoadedBase,
    adapters: Sequence[Adapter],
    task: TaskFile,
    rows: Rows,
    parameters: LorahubParameters | None = None,
    *,
    batch_size: int = 32,
) -> Tried:
    """min over |w_t| ≤ bound of loss(Σ w_t Δ_t) + l1 Σ |w_t|, from w = 0 on (LoraHub, arXiv:2307.13269).

    Every try is the loss of the merge itself, head and rank included. The paper takes Nevergrad's optimisers; here it
    is SciPy's COBYLA, which needs no gradients either and is the same each time. The penalty is that of the paper; its
    released code divides it by the number of adapters.

    Args:
        loaded: The base model, for the task's kind.
        adapters: What is merged.
        task: The task that the merged adapter is for.
        rows: A few of its rows.
        parameters: How to search.
        batch_size: Rows a batch.

    Raises:
        ConfigError: If the task needs a head and no adapter has one for its labels.
        MergeError: If no weights are better than none.
        BaseMismatchError: If an adapter belongs to another base.
    """
    chosen = parameters or LorahubParameters()
    info = rows.info(task)
    head = _head(adapters, info)

    def loss(weights: Sequence[float]) -> float:
        merged = merge(adapters, "lorahub", weights=weights, parameters=chosen) if any(weights) else None
        own = merged if merged is not None and merged.head_tensors() else head
        pairs = zip(rows.texts, rows.targets, strict=True)
        scored = score(
            loaded, [Query(text, merged, own, info, target) for text, target in pairs], batch_size=batch_size
        )
        return sum(row.loss for row in scored) / max(1, sum(row.targets for row in scored))

    return search(loss, len(adapters), chosen)


def search(loss: Callable[[Sequence[float]], float], count: int, parameters: LorahubParameters) -> Tried:
    """The best of the weights that COBYLA tries.

    Args:
        loss: Of weights.
        count: How many.
        parameters: Bound, penalty and number of tries.

    Raises:
        MergeError: If no weights are better than none.
    """
    from scipy.optimize import minimize

    tried: dict[tuple[float, ...], tuple[float, float]] = {}

    def objective(point: NDArray[np.float64]) -> float:
        weights = tuple(float(weight) for weight in np.clip(point, -parameters.bound, parameters.bound))
        if weights not in tried:
            found = loss(weights)
            tried[weights] = found + parameters.l1 * sum(map(abs, weights)), found
        return tried[weights][0]

    start = np.zeros(count)
    options: Any = {"maxiter": parameters.tries, "rhobeg": min(_FIRST_STEP, parameters.bound), "tol": 1e-3}
    minimize(objective, start, method="COBYLA", options=options)
    best = min(tried, key=lambda weights: tried[weights][0])
    base_loss = tried[tuple([0.0] * count)][1]
    if not any(best):
        raise MergeError(
            f"lorahub: none of {len(tried)} weights lowers the loss of the bare base, {base_loss:.4f}, by more than "
            "the penalty; give other adapters, more rows with --tune-rows, or a smaller --l1"
        )
    return Tried(best, tried[best][1], tried[best][0], base_loss, len(tried))


def _head(adapters: Sequence[Adapter], info: TaskInfo) -> Adapter | None:
    """The first adapter that can read the task, where a head is needed."""
    if info.kind not in HEADED:
        return None
    for adapter in adapters:
        own = adapter.spec.task
        if own is not None and adapter.head_tensors() and (own.kind, own.labels) == (info.kind, info.labels):
            return adapter
    wanted = ", ".join(info.labels) or "a number"
    raise ConfigError(
        f"lorahub: none of the adapters has a head for {info.name} ({wanted}); tune on a task that one of them was "
        "trained for, or on one of a language model, which needs no head"
    )
