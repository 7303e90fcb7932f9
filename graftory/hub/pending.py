"""The names whose rows in the index are being changed: `.hub/pending`, there only while a writer is at work.

A writer notes the name first, then changes records or aliases, then the index, and removes the note
last. Wherever it is broken off, a reader knows which rows of the index may be old.
"""

from __future__ import annotations

from pathlib import Path

from graftory.errors import CorruptAdapterError
from graftory.hub import strict_json
from graftory.hub.files import sync_folder, write_atomic
from graftory.hub.records import is_name
from graftory.schema import canonical


def read(path: Path) -> tuple[str, ...] | None:
    """The names; empty if nobody is writing, None if the note is damaged and every row may be old."""
    try:
        names = strict_json.loads(path.read_bytes(), str(path))
    except FileNotFoundError:
        return ()
    except CorruptAdapterError:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) and is_name(name) for name in names):
        return None
    return tuple(names)


def write(path: Path, names: tuple[str, ...], scratch: Path) -> None:
    """Note that rows are being changed; durable when this returns."""
    write_atomic(path, canonical(list(names)) + b"\n", scratch)


def clear(path: Path) -> None:
    """Note that the index is up to date; durable when this returns."""
    if path.exists():
        path.unlink()
        sync_folder(path.parent)
