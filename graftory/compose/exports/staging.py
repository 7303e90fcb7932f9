"""A folder that appears whole or not at all, also if the process is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from filelock import FileLock, Timeout

from graftory.errors import ConfigError

_ENDING = ".partial"
_LOCK = ".lock"


def check_free(folder: Path) -> None:
    """Check that a folder can be made.

    Raises:
        ConfigError: If it has something in it, or is no folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder; give a new one")


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """A folder beside the one that is meant, renamed to it at the end; on an error it is removed.

    What a killed process left beside the same folder is removed first. A folder of a process that is still at work is
    known by its lock, which the system takes back from a process that has died.

    Raises:
        ConfigError: If the folder has something in it.
    """
    target = Path(folder).absolute()
    check_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    outer = Path(mkdtemp(prefix=f".{target.name}.", suffix=_ENDING, dir=target.parent))
    try:
        with FileLock(outer / _LOCK):
            inner = outer / "folder"
            inner.mkdir()
            yield inner
            _sync(inner)
            if target.exists():
                target.rmdir()
            inner.rename(target)
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def _sweep(target: Path) -> None:
    for left in target.parent.iterdir():
        if not (left.name.startswith(f".{target.name}.") and left.name.endswith(_ENDING) and (left / _LOCK).exists()):
            continue
        try:
            with FileLock(left / _LOCK, timeout=0):
                shutil.rmtree(left, ignore_errors=True)
        except (Timeout, OSError):
            continue


def _sync(folder: Path) -> None:
    """Hand what was written to the disk before the folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as stream:
                os.fsync(stream.fileno())
