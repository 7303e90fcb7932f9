"""Collecting garbage: what crashes, broken transfers and hands left behind in a hub, and nothing else."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from graftory.adapter import AdapterRef
from graftory.errors import CorruptAdapterError, RemoteError
from graftory.hub.depot import Depot
from graftory.hub.records import is_name

KEEP_SECONDS = 24 * 3600.0
"""How long an unfinished download is kept: the next pull goes on with it."""
Needs = Mapping[AdapterRef, frozenset[str]]
"""The hashes of the files that each version names."""
_VERSION = "[1-9][0-9]{0,8}"
_LAYOUT = tuple(
    re.compile(pattern)
    for pattern in (
        r"lock|pending|remotes\.json|\.gitignore|\.gitattributes|tmp/.*",
        rf"records/(?P<name>.+)/{_VERSION}\.json",
        r"blobs/sha256/([0-9a-f]{2})/\1[0-9a-f]{62}",
        r"aliases/(?P<name>.+)\.jsonl",
        rf"signatures/(?P<name>.+)/{_VERSION}/[0-9a-f]{{16,64}}\.json",
    )
)
"""What a hub's own files are called."""
_SIGNATURE = re.compile(rf"(?P<name>.+)/(?P<version>{_VERSION})/[0-9a-f]{{16,64}}\.json")
_HASH = re.compile(rb"[0-9a-f]{64}")


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
    early = read_needs(depot)  # a record never changes, so most of the reading is done before others must wait
    with depot.lock():
        needs = read_needs(depot, early)
        removed = clean(depot, needs, dry_run=dry_run, keep_seconds=keep_seconds)
        if not dry_run:
            with suppress(CorruptAdapterError):  # a damaged alias log is the affair of hub verify
                depot.repair()
            _empty_folders(depot)
    return Collected(removed, dry_run)


def read_needs(depot: Depot, known: Needs | None = None) -> dict[AdapterRef, frozenset[str]]:
    """The hashes of all files that records name.

    Args:
        depot: The hub.
        known: What was read earlier, and is not read again.

    Raises:
        CorruptAdapterError: If a record cannot be read.
    """
    needs = dict(known or {})
    for name in depot.records.names():
        for version in depot.records.versions(name):
            ref = AdapterRef(name, version=version)
            if ref in needs:
                continue
            try:
                record = depot.records.read(name, version)
            except CorruptAdapterError as error:
                raise CorruptAdapterError(
                    f"{error}; which files it needs is unknown, so none was removed: see hub verify"
                ) from None
            needs[ref] = frozenset(entry.sha256 for entry in record.files)
    return needs


def clean(
    depot: Depot, needs: Needs, *, dry_run: bool = False, keep_seconds: float = KEEP_SECONDS
) -> tuple[Removed, ...]:
    """Remove what no version needs; the caller holds the hub's lock, and `needs` is of all its records."""
    found = [*_blobs(depot, needs), *_scratch(depot), *_signatures(depot)]
    removed = [_remove(depot, path, why, dry_run) for path, why in found]
    removed += _partial(depot, keep_seconds, dry_run)
    return tuple(removed)


def strays(depot: Depot) -> Iterator[Path]:
    """Files in `.hub` that are nothing of a hub. They are somebody's, and stay."""
    for folder, _, names in os.walk(depot.folder):
        for name in sorted(names):
            path = Path(folder, name)
            if not _is_ours(path.relative_to(depot.folder).as_posix()):
                yield path


def _is_ours(path: str) -> bool:
    match = next((match for match in (pattern.fullmatch(path) for pattern in _LAYOUT) if match), None)
    return match is not None and is_name(match.groupdict().get("name") or "x")


def _blobs(depot: Depot, needs: Needs) -> Iterator[tuple[Path, str]]:
    needed = set(_mentioned(depot)).union(*needs.values())
    for sha256 in depot.blobs.all():
        if sha256 not in needed:
            yield depot.blobs.path(sha256), "no version needs it"


def _mentioned(depot: Depot) -> Iterator[str]:
    """Hashes in files among the records that are no records, say one that was put aside by hand: it may come back."""
    home = depot.folder / "records"
    for path in home.rglob("*"):
        if path.is_file() and not _is_ours(path.relative_to(depot.folder).as_posix()):
            yield from (match.decode() for match in _HASH.findall(path.read_bytes()))


def _scratch(depot: Depot) -> Iterator[tuple[Path, str]]:
    """Files that a writer was making when it was broken off: every writer holds the lock that is held here."""
    for path in sorted(depot.tmp.glob("*")):
        if path.is_file():
            yield path, "temporary file of a broken write"


def _signatures(depot: Depot) -> Iterator[tuple[Path, str]]:
    home = depot.folder / "signatures"
    for path in sorted(home.rglob("*.json")):
        match = _SIGNATURE.fullmatch(path.relative_to(home).as_posix())
        if match and is_name(match["name"]) and int(match["version"]) not in depot.records.versions(match["name"]):
            yield path, "signature of a version that is not here"


def _partial(depot: Depot, keep_seconds: float, dry_run: bool) -> Iterator[Removed]:
    """Unfinished downloads; one that a transfer holds is left alone."""
    home = depot.staging.home
    for sha256 in sorted({path.name.removesuffix(".lock") for path in home.glob("*")}):
        path = depot.staging.path(sha256)
        if _age(path) < keep_seconds:
            continue
        with _held(depot, sha256) as mine:
            if mine and path.is_file():
                yield _remove(depot, path, "unfinished download", dry_run)


def _age(path: Path) -> float:
    """Seconds since a file was written to; without end if it is gone: a transfer ends at any moment."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


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
    """Remove folders that hold nothing any more; not `tmp`, which is used outside of the lock."""
    for top in ("blobs", "signatures", "records", "aliases"):
        folders: Iterable[Path] = (path for path in (depot.folder / top).rglob("*") if path.is_dir())
        for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # something is in it
                folder.rmdir()
