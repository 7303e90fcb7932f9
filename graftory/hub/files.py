"""Files that are either there in full or not at all: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

from graftory.errors import StorageError

_CHUNK = 1 << 20
KEPT = "keeps what came"
"""What is true of an unfinished download on a full disk."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def disk(path: Path, left: str = "is as it was") -> Iterator[None]:
    """Say in our words that a disk is full.

    Args:
        path: The file that is written.
        left: What is true of it then.

    Raises:
        StorageError: If the disk, its quota or the largest size of a file is exhausted within.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageError(
            f"{path}: cannot be written ({os.strerror(error.errno)}) and {left}; make room and try again"
        ) from error


def settle(path: Path) -> None:
    """Make the name of a file that was just put in place durable.

    Raises:
        StorageError: If the disk is full, as some only say now; the file is there, and may be gone after a power cut.
    """
    try:
        sync_folder(path.parent)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageError(
            f"{path}: is written, but the disk cannot make it durable ({os.strerror(error.errno)}); "
            "make room and try again"
        ) from error


def write_atomic(path: Path, data: bytes, scratch: Path) -> None:
    """Put `data` at `path`, replacing what is there, durable when this returns.

    Args:
        path: The file; its folders are made.
        data: Its new bytes.
        scratch: A folder of the same file system for the temporary file.

    Raises:
        StorageError: If the disk is full; `path` is then as it was, unless the error says otherwise.
        OSError: If the disk refuses otherwise.
    """
    with disk(path), _temporary(data, scratch) as written:
        make_folder(path.parent)
        written.replace(path)
    settle(path)


def create_exclusive(path: Path, data: bytes, scratch: Path) -> None:
    """Put `data` at `path` unless something is there: of two writers exactly one succeeds.

    Args:
        path: The file; its folders are made.
        data: Its bytes.
        scratch: A folder of the same file system for the temporary file.

    Raises:
        FileExistsError: If `path` exists.
        StorageError: If the disk is full; `path` is then not there, unless the error says otherwise.
        OSError: If the disk refuses otherwise.
    """
    with disk(path), _temporary(data, scratch) as written:
        make_folder(path.parent)
        try:
            os.link(written, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links; the hub's lock keeps other writers away
            if path.exists():
                raise FileExistsError(str(path)) from None
            written.replace(path)
    settle(path)


def adopt(staged: Path, path: Path) -> None:
    """Move a finished file of the same file system to `path`, durable when this returns.

    Raises:
        StorageError: If the disk is full; both are then as they were, unless the error says otherwise.
        FileNotFoundError: If `staged` is gone.
    """
    with disk(path):
        sync_file(staged)
        make_folder(path.parent)
        staged.replace(path)
    settle(path)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, each durable in its own parent."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make the bytes of a file durable.

    Raises:
        StorageError: If the disk is full, as some only say now.
    """
    with disk(path, KEPT):
        handle = os.open(path, os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (nothing to do on Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_on(source: Path, target: Path, progress: Callable[[int], None]) -> None:
    """Copy a file, going on where an earlier copy was broken off.

    Args:
        source: The file.
        target: The copy; what is there counts as its beginning, unless it is longer than the file.
        progress: Told how many bytes are there.
    """
    size = source.stat().st_size
    with disk(target, KEPT), source.open("rb") as reader, target.open("ab") as writer:
        if writer.tell() > size:
            empty(writer)
        reader.seek(min(writer.tell(), size))
        while chunk := reader.read(_CHUNK):
            writer.write(chunk)
            progress(reader.tell())


def empty(file: IO[bytes]) -> None:
    """Throw away what an open file holds, and begin anew."""
    file.seek(0)
    file.truncate()


def map_file(path: Path) -> memoryview:
    """The bytes of a file, read only when looked at.

    Raises:
        OSError: If it cannot be opened.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    return hashlib.sha256(map_file(path)).hexdigest()


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
