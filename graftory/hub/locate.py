"""Finding the hub: an explicit path, `GRAFTORY_REGISTRY`, the nearest `registry.json` upward, the user's own."""

from __future__ import annotations

import os
from pathlib import Path

from graftory.errors import HubNotFoundError
from graftory.hub.index import FILE_NAME, FORMAT

VARIABLE = "GRAFTORY_REGISTRY"


def is_hub(folder: Path) -> bool:
    """Whether a folder holds a hub: our `registry.json`, or records whose index was lost."""
    if (folder / ".hub" / "records").is_dir():
        return True
    try:
        with (folder / FILE_NAME).open("rb") as file:
            return f'"{FORMAT}"'.encode() in file.read(256)
    except OSError:
        return False


def find_hub(path: str | Path | None = None) -> Path:
    """The folder of the hub to use.

    Args:
        path: The hub's folder, or its `registry.json`; None to look for it.

    Returns:
        The folder. Only where nothing was asked for and nothing found, it is the hub in the user's
        data directory, which may not exist yet.

    Raises:
        HubNotFoundError: If there is no hub at the path or where `GRAFTORY_REGISTRY` points.
    """
    asked = path if path is not None else os.environ.get(VARIABLE) or None
    if asked is not None:
        folder = _folder(Path(asked))
        if not is_hub(folder):
            source = "" if path is not None else f" ({VARIABLE})"
            raise HubNotFoundError(f"no hub at {folder}{source}: no {FILE_NAME}; make one with: hub init {folder}")
        return folder
    here = Path.cwd()
    nearest = next((folder for folder in (here, *here.parents) if is_hub(folder)), None)
    return nearest if nearest is not None else user_hub()


def user_hub() -> Path:
    """The hub in the user's data directory."""
    from platformdirs import user_data_path

    return user_data_path("graftory", appauthor=False) / "hub"


def _folder(path: Path) -> Path:
    path = path.expanduser()
    return (path.parent if path.name == FILE_NAME else path).resolve()
