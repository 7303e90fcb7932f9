"""Teach the router of a run one more task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from graftory.continual.router import Router
from graftory.continual.router_file import load_router, save_router
from graftory.continual.sequence import TaskSequence
from graftory.data import Rows, Text
from graftory.training import LoadedBase
from graftory.training.features import depth_of, layer_features_of

_HELD_OUT = 5
"""Every fifth row of what the router looks at is kept apart, for its bound and for the choice of the layer."""
_MOST_HELD_OUT = 500


def fresh_router(sequence: TaskSequence, loaded: LoadedBase) -> Router:
    """The router of a sequence before its first task.

    Raises:
        ConfigError: If the settings ask for a layer that the base lacks.
    """
    return Router.on(sequence.router, depth_of(loaded))


def router_features(loaded: LoadedBase, router: Router, texts: Sequence[Text], batch_size: int) -> Tensor:
    """What a router reads of texts, [rows, layers, width]."""
    return layer_features_of(loaded, texts, router.layers, batch_size=batch_size)


def fit_router(sequence: TaskSequence, loaded: LoadedBase, path: Path, name: str, rows: Rows) -> Router:
    """The router with a task added; as it is in the file if that was done before the run was stopped.

    Args:
        sequence: The run's; its limits and seeds choose the rows.
        loaded: The base, no adapter attached.
        path: The router's file, which is written.
        name: The task.
        rows: Its training rows.
    """
    router = load_router(path) if path.exists() else fresh_router(sequence, loaded)
    if name in router.names:
        return router
    limit = sequence.limits.router
    some = rows if limit is None else rows.subsample(limit, sequence.seed_of(name, "router"))
    features = router_features(loaded, router, some.texts, sequence.eval_batch_size)
    held_out = list(range(_HELD_OUT - 1, len(some), _HELD_OUT))[:_MOST_HELD_OUT]
    fitted = sorted(set(range(len(some))) - set(held_out))
    labels = torch.tensor([int(target) for target in some.targets])[fitted] if some.labels else None
    router = router.add(name, features[fitted], features[held_out], labels=labels)
    save_router(router, path)
    return router
