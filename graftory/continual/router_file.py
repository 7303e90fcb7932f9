"""A router on disk: tensors in safetensors, everything else as JSON in the same file's metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from graftory.continual.files import write_atomically
from graftory.continual.router import Router, RouterSettings
from graftory.continual.router_view import RoutedTask, View
from graftory.continual.triangle import packed, unpacked
from graftory.errors import CorruptAdapterError
from graftory.schema import canonical, decode

_FORMAT = "graftory-router-3"
_PARTS = ("centroids", "shares", "tail")


@dataclass(frozen=True, slots=True)
class _TaskHeader:
    name: str
    validated: int


@dataclass(frozen=True, slots=True)
class _ViewHeader:
    layers: tuple[int, ...]
    rows: int
    right: int


@dataclass(frozen=True, slots=True)
class _Header:
    format: str
    settings: RouterSettings
    tasks: tuple[_TaskHeader, ...]
    views: tuple[_ViewHeader, ...]
    held_out: int


def save_router(router: Router, path: Path) -> None:
    """Write a router, all or nothing."""
    tensors: dict[str, Tensor] = {}
    for v, view in enumerate(router.views):
        if view.scatter is not None:
            tensors[f"{v}.scatter"] = packed(view.scatter)
        for i, task in enumerate(view.tasks):
            values = (task.centroids, task.shares, task.tail)
            tensors |= {f"{v}.{i}.{part}": value.contiguous() for part, value in zip(_PARTS, values, strict=True)}
    tasks = tuple(_TaskHeader(task.name, task.validated) for task in (router.views[0].tasks if router.views else ()))
    views = tuple(_ViewHeader(view.layers, view.rows, view.right) for view in router.views)
    header = _Header(_FORMAT, router.settings, tasks, views, router.held_out)
    write_atomically(path, save(tensors, metadata={"graftory": canonical(header).decode()}))


def load_router(path: Path) -> Router:
    """Read a router.

    Raises:
        CorruptAdapterError: If the file is not one that `save_router` wrote.
        ConfigError: If its header does not fit.
    """
    try:
        with safe_open(path, "pt") as file:
            data = json.loads((file.metadata() or {}).get("graftory", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise CorruptAdapterError(f"{path} cannot be read as a router ({error}); delete it and run again") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise CorruptAdapterError(f"{path} is not a router of format {_FORMAT}; delete it and run again")
    header = decode(_Header, data, str(path))
    views, tasks = range(len(header.views)), range(len(header.tasks))
    wanted = {f"{v}.{i}.{part}" for v in views for i in tasks for part in _PARTS}
    if set(tensors) != wanted | {f"{v}.scatter" for v in views if tasks}:
        raise CorruptAdapterError(f"{path} lacks tensors of a router, or has others; delete it and run again")
    return Router(header.settings, tuple(_view(header, v, tensors) for v in views), header.held_out)


def _view(header: _Header, v: int, tensors: dict[str, Tensor]) -> View:
    tasks = []
    for i, task in enumerate(header.tasks):
        centroids, shares, tail = (tensors[f"{v}.{i}.{part}"] for part in _PARTS)
        tasks.append(RoutedTask(task.name, centroids, shares, tail, task.validated))
    triangle: Tensor | None = tensors.get(f"{v}.scatter")
    scatter = None if triangle is None else unpacked(triangle)
    own = header.views[v]
    return View(own.layers, tuple(tasks), scatter, own.rows, own.right)
