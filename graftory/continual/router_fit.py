"""Teach the router of a run one more task."""

from __future__ import annotations

from pathlib import Path

from graftory.continual.router import Router
from graftory.continual.router_file import load_router, save_router
from graftory.continual.sequence import TaskSequence
from graftory.data import Rows
from graftory.training import LoadedBase
from graftory.training.features import features_of

_HELD_OUT = 5
"""Every fifth row of what the router looks at is kept apart, for its bound."""


def fit_router(sequence: TaskSequence, loaded: LoadedBase, path: Path, name: str, rows: Rows) -> Router:
    """The router with a task added; as it is in the file if that was done before the run was stopped.

    Args:
        sequence: The run's; its limits and seeds choose the rows.
        loaded: The base, no adapter attached.
        path: The router's file, which is written.
        name: The task.
        rows: Its training rows.
    """
    router = load_router(path) if path.exists() else Router(sequence.router)
    if name in router.names:
        return router
    limit = sequence.limits.router
    some = rows if limit is None else rows.subsample(limit, sequence.seed_of(name, "router"))
    features = features_of(loaded, some.texts, batch_size=sequence.eval_batch_size)
    held_out = [i for i in range(len(some)) if i % _HELD_OUT == _HELD_OUT - 1]
    fitted = [i for i in range(len(some)) if i % _HELD_OUT != _HELD_OUT - 1]
    router = router.add(name, features[fitted], features[held_out])
    save_router(router, path)
    return router
