"""A router on disk: tensors in safetensors, everything else as JSON in the same file's metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from graftory.continual.files import write_atomically
from graftory.continual.router import RoutedTask, Router, RouterSettings
from graftory.errors import CorruptAdapterError
from graftory.schema import canonical, decode

_FORMAT = "graftory-router-1"


@dataclass(frozen=True, slots=True)
class _TaskHeader:
    name: str
    outside: int


@dataclass(frozen=True, slots=True)
class _Header:
    format: str
    settings: RouterSettings
    tasks: tuple[_TaskHeader, ...]
    rows: int


def save_router(router: Router, path: Path) -> None:
    """Write a router, all or nothing."""
    tensors = {} if router.scatter is None else {"scatter": router.scatter.contiguous()}
    for i, task in enumerate(router.tasks):
        tensors |= {f"{i}.centroids": task.centroids.contiguous(), f"{i}.tail": task.tail.contiguous()}
    header = _Header(_FORMAT, router.settings, tuple(_TaskHeader(t.name, t.outside) for t in router.tasks), router.rows)
    write_atomically(path, save(tensors, metadata={"graftory": canonical(header).decode()}))


def load_router(path: Path) -> Router:
    """Read a router.

    Raises:
        CorruptAdapterError: If the file is not one that `save_router` wrote.
        ConfigError: If its header does not fit.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise CorruptAdapterError(f"{path} cannot be read as a router ({error}); delete it and run again") from error
    header = decode(_Header, json.loads(metadata.get("graftory", "{}")), str(path))
    wanted = {f"{i}.{part}" for i in range(len(header.tasks)) for part in ("centroids", "tail")}
    if header.format != _FORMAT or set(tensors) - {"scatter"} != wanted:
        raise CorruptAdapterError(f"{path} is not a router of format {_FORMAT}; delete it and run again")
    return Router(
        header.settings,
        tuple(
            RoutedTask(task.name, tensors[f"{i}.centroids"], tensors[f"{i}.tail"], task.outside)
            for i, task in enumerate(header.tasks)
        ),
        tensors.get("scatter"),
        header.rows,
    )
