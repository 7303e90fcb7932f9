"""A hub in a folder: `file:///dir`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from graftory.adapter import AdapterRef
from graftory.errors import CorruptAdapterError, RemoteError
from graftory.hub.depot import Depot
from graftory.hub.files import copy_on
from graftory.hub.locate import is_hub
from graftory.hub.records import FileEntry, Record
from graftory.hub.remotes.base import Blobs, Foreign
from graftory.hub.resolve import resolve
from graftory.progress import Progress

_MAX_PATH = 4000
"""Most letters of a path; every system that we know takes less than 4096 bytes."""


class DirectoryRemote:
    """A hub in a folder. What a push writes goes through the same `Depot` as a local hub's: its lock, its order."""

    def __init__(self, folder: Path) -> None:
        self._depot = Depot(folder)

    @property
    def address(self) -> str:
        """See `Remote`."""
        return self._depot.root.as_uri()

    def listing(self) -> Mapping[str, tuple[int, ...]]:
        """See `Remote`."""
        return {name: self._depot.records.versions(name) for name in self._depot.records.names()}

    def record(self, ref: str) -> Record:
        """See `Remote`."""
        found = resolve(self._depot, ref)
        return self._depot.records.read(found.name, found.version or 0)

    def find(self, digest: str, hint: str) -> Record | None:
        """See `Remote`."""
        return self._depot.records.find(digest, hint)

    def peek(self, item: Record | Foreign, entry: FileEntry, length: int) -> bytes:  # noqa: ARG002 (the interface's)
        """See `Remote`."""
        with self._blob(entry).open("rb") as file:
            return file.read(length)

    def fetch(self, item: Record | Foreign, entry: FileEntry, target: Path, progress: Callable[[int], None]) -> None:  # noqa: ARG002 (the interface's)
        """See `Remote`."""
        path = self._blob(entry)
        size = path.stat().st_size
        if size != entry.size:
            raise CorruptAdapterError(
                f"{entry.path}: {path} has {size} bytes, recorded are {entry.size}; it is damaged, push it again"
            )
        copy_on(path, target, progress)

    def send(self, records: Sequence[Record], blobs: Blobs, progress: Progress) -> None:
        """See `Remote`."""
        with self._writing():
            self._depot.create()
            for record in records:
                self._depot.receive(record, partial(_copy, record, blobs, progress))

    def aliases(self, name: str) -> Mapping[str, int]:
        """See `Remote`."""
        return self._depot.aliases.current(name)

    def move_alias(self, name: str, alias: str, version: int) -> None:
        """See `Remote`."""
        with self._writing():
            self._depot.move_alias(name, alias, version)

    def signatures(self, record: Record) -> Mapping[str, bytes]:
        """See `Remote`."""
        return self._depot.signatures.of(record.name, record.version)

    def add_signatures(self, record: Record, signatures: Mapping[str, bytes]) -> None:
        """See `Remote`."""
        with self._writing():
            for key_id, data in signatures.items():
                self._depot.add_signature(record, key_id, data)

    def _blob(self, entry: FileEntry) -> Path:
        path = self._depot.blobs.path(entry.sha256)
        if not path.is_file():
            raise CorruptAdapterError(
                f"{entry.path}: blob sha256:{entry.sha256[:12]}… is missing from {self._depot.root}; push it again"
            )
        return path

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (PermissionError, NotADirectoryError) as error:
            raise RemoteError(
                f"{self._depot.root}: cannot be written ({error.strerror}); give another folder"
            ) from None


def _copy(record: Record, blobs: Blobs, progress: Progress, entry: FileEntry, target: Path) -> None:
    def report(done: int) -> None:
        progress(f"{record.ref} {entry.path}", done, entry.size)

    copy_on(blobs(entry), target, report)


def open_remote(address: str) -> DirectoryRemote:
    """The hub to push to: the folder itself, an existing hub, an empty folder or a missing one."""
    folder = _folder(address)
    if not is_hub(folder):
        outer = next((parent for parent in folder.parents if is_hub(parent)), None)
        if outer is not None:
            raise RemoteError(
                f"{address}: lies inside the hub {outer}; push to file://{outer.as_posix()}, or make a hub of its own "
                f"there first: hub init {folder}"
            )
        # a push that was broken off while it made the hub leaves `.hub` and nothing else
        if folder.exists() and (not folder.is_dir() or any(path.name != ".hub" for path in folder.iterdir())):
            raise RemoteError(f"{address}: exists and is not a hub; give a hub, an empty folder or a new one")
    return DirectoryRemote(folder)


def split_remote_ref(address: str) -> tuple[DirectoryRemote, str]:
    """The hub and the reference in `file:///dir/name@1`: the longest part that is a hub, and the rest."""
    folder = _folder(address)
    for parent in folder.parents:
        if is_hub(parent):
            return DirectoryRemote(parent), str(AdapterRef.parse(folder.relative_to(parent).as_posix()))
    raise RemoteError(f"{address}: no hub on this path; wanted file:///folder/of/a/hub/name, or name@version")


def _folder(address: str) -> Path:
    try:
        parts = urlsplit(address)
    except ValueError:  # brackets that are not of an IPv6 address
        raise RemoteError(f"{address!r:.200} is not an address; wanted file:///absolute/folder") from None
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise RemoteError(f"{address}: names a host or a relative path; wanted file:///absolute/folder")
    path = url2pathname(parts.path) if os.name == "nt" else unquote(parts.path)
    if not path.isprintable() or len(path) > _MAX_PATH:
        raise RemoteError(f"{address!r:.200} is not the path of a folder; wanted file:///absolute/folder")
    return Path(os.path.normpath(path))
