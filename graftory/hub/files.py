"""Files that are either there in full or not at all: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


def write_atomic(path: Path, data: bytes, scratch: Path) -> None:
    """Put `data` at `path`, replacing what is there, durable when this returns.

    Args:
        path: The file; its folders are made.
        data: Its new bytes.
        scratch: A folder of the same file system for the temporary file.

    Raises:
        OSError: If the disk refuses; `path` is then as it was.
    """
    make_folder(path.parent)
    with _temporary(data, scratch) as written:
        written.replace(path)
        sync_folder(path.parent)


def create_exclusive(path: Path, data: bytes, scratch: Path) -> None:
    """Put `data` at `path` unless something is there: of two writers exactly one succeeds.

    Args:
        path: The file; its folders are made.
        data: Its bytes.
        scratch: A folder of the same file system for the temporary file.

    Raises:
        FileExistsError: If `path` exists.
        OSError: If the disk refuses; `path` is then not there.
    """
    make_folder(path.parent)
    with _temporary(data, scratch) as written:
        try:
            os.link(written, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links; the hub's lock keeps other writers away
            if path.exists():
                raise FileExistsError(str(path)) from None
            written.replace(path)
        sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, each durable in its own parent."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (nothing to do on Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _temporary(data: bytes, scratch: Path) -> Iterator[Path]:
    make_folder(scratch)
    path = scratch / uuid4().hex
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)
