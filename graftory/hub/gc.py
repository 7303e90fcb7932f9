"""Collecting garbage: what crashes, broken transfers and hands left behind in a hub, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from graftory.errors import CorruptAdapterError, RemoteError
from graftory.hub.depot import Depot
from graftory.hub.records import is_name

KEEP_SECONDS = 24 * 3600.0
"""How long an unfinished download is kept: the next pull goes on with it."""


@dataclass(frozen=True, slots=True)
class Removed:
    """One file that was, or would be, removed.

    Attributes:
        path: Where it lay, below the hub's root.
        size: Its bytes.
        why: What it was.
    """

    path: str
    size: int
    why: str


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed, or would remove."""

    removed: tuple[Removed, ...]
    dry_run: bool

    @property
    def freed(self) -> int:
        """Bytes of all of it."""
        return sum(item.size for item in self.removed)


def collect(depot: Depot, *, dry_run: bool = False, keep_seconds: float = KEEP_SECONDS) -> Collected:
    """Remove blobs that no record names, temporary files, and unfinished downloads that nobody is at.

    All of it happens under the hub's lock, which every writer of records and blobs holds from its first
    blob to its record; a download outside of the lock holds the lock of its file. So nothing that a
    running push or pull needs is touched.

    Args:
        depot: The hub.
        dry_run: Only say what would be removed.
        keep_seconds: How old an unfinished download must be.

    Raises:
        CorruptAdapterError: If a record cannot be read, as it cannot be known which blobs it names;
            nothing is removed.
    """
    with depot.lock():
        if not dry_run:
            depot.repair()
        found = [*_blobs(depot), *_scratch(depot), *_signatures(depot)]
        removed = [_remove(depot, path, why, dry_run) for path, why in found]
        removed += _partial(depot, keep_seconds, dry_run)
        if not dry_run:
            _empty_folders(depot)
    return Collected(tuple(removed), dry_run)


def needed_blobs(depot: Depot) -> set[str]:
    """The hashes of all files that a record names.

    Raises:
        CorruptAdapterError: If a record cannot be read.
    """
    needed: set[str] = set()
    for name in depot.records.names():
        for version in depot.records.versions(name):
            try:
                record = depot.records.read(name, version)
            except CorruptAdapterError as error:
                raise CorruptAdapterError(
                    f"{error}; which files it needs is unknown, so none was removed: see hub verify"
                ) from None
            needed.update(entry.sha256 for entry in record.files)
    return needed


def _blobs(depot: Depot) -> Iterator[tuple[Path, str]]:
    needed = needed_blobs(depot)
    for sha256 in depot.blobs.all():
        if sha256 not in needed:
            yield depot.blobs.path(sha256), "no version needs it"


def _scratch(depot: Depot) -> Iterator[tuple[Path, str]]:
    """Files that a writer was making when it was broken off: every writer holds the lock that is held here."""
    for path in sorted(depot.tmp.glob("*")):
        if path.is_file():
            yield path, "temporary file of a broken write"


def _signatures(depot: Depot) -> Iterator[tuple[Path, str]]:
    home = depot.folder / "signatures"
    for path in sorted(home.rglob("*.json")):
        name, version = path.parent.parent.relative_to(home).as_posix(), path.parent.name
        known = depot.records.versions(name) if is_name(name) else ()
        if version.isdecimal() and int(version) not in known:
            yield path, "signature of a version that is not here"


def _partial(depot: Depot, keep_seconds: float, dry_run: bool) -> Iterator[Removed]:
    """Unfinished downloads; one that a transfer holds is left alone."""
    home = depot.staging.home
    for sha256 in sorted({path.name.removesuffix(".lock") for path in home.glob("*")}):
        path = depot.staging.path(sha256)
        if path.exists() and time.time() - path.stat().st_mtime < keep_seconds:
            continue
        with _held(depot, sha256) as mine:
            if mine and path.exists():
                yield _remove(depot, path, "unfinished download", dry_run)


@contextmanager
def _held(depot: Depot, sha256: str) -> Iterator[bool]:
    """Whether nobody else was at a download; then nobody is until this ends, and its lock file is gone after."""
    try:
        with depot.staging.hold([sha256], wait=0.0):
            yield True
    except RemoteError:
        yield False


def _remove(depot: Depot, path: Path, why: str, dry_run: bool) -> Removed:
    removed = Removed(path.relative_to(depot.root).as_posix(), path.stat().st_size, why)
    if not dry_run:
        path.unlink()
    return removed


def _empty_folders(depot: Depot) -> None:
    """Folders that hold nothing any more; not `tmp`, which is used outside of the lock."""
    for top in ("blobs", "signatures", "records", "aliases"):
        folders = [path for path in (depot.folder / top).rglob("*") if path.is_dir()]
        for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # something is in it
                folder.rmdir()
