"""Remotes: hubs elsewhere. A small interface, one class for each scheme, one table."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from graftory.adapter import AdapterRef
from graftory.errors import CorruptAdapterError, RemoteError
from graftory.hub.depot import Depot
from graftory.hub.locate import is_hub
from graftory.hub.records import Record
from graftory.hub.resolve import resolve


class Remote(Protocol):
    """A hub elsewhere, as `transfer` needs it. No method changes a version that exists."""

    def record(self, ref: AdapterRef) -> Record:
        """The record that a reference means there.

        Raises:
            AdapterNotFoundError: If it means nothing there.
            CorruptAdapterError: If the record is damaged.
            RemoteError: If the remote cannot be read.
        """

    def find(self, digest: str, hint: str) -> Record | None:
        """The record with a digest, or None; `hint` is the name it probably has. Raises as `record`."""

    def read(self, record: Record, path: str) -> bytes:
        """The bytes of one file, hashed.

        Raises:
            CorruptAdapterError: If they are missing or not the recorded ones.
            RemoteError: If the remote cannot be read.
        """

    def receive(self, record: Record, fetch: Callable[[str], bytes]) -> None:
        """Keep a record with its files: the files first, skipping those there already, the record last.
        Broken off at any point, it leaves no reference to what is not there, and can be repeated.

        Raises:
            VersionConflictError: If the version exists with other bytes; nothing is changed.
            RemoteError: If the remote cannot be written.
        """


class DirectoryRemote:
    """A hub in a folder, `file:///dir`."""

    def __init__(self, folder: Path) -> None:
        self._depot = Depot(folder)

    def record(self, ref: AdapterRef) -> Record:
        """See `Remote`."""
        found = resolve(self._depot, ref)
        return self._depot.records.read(found.name, found.version or 0)

    def find(self, digest: str, hint: str) -> Record | None:
        """See `Remote`."""
        return self._depot.records.find(digest, hint)

    def read(self, record: Record, path: str) -> bytes:
        """See `Remote`."""
        return read_file(self._depot, record, path)

    def receive(self, record: Record, fetch: Callable[[str], bytes]) -> None:
        """See `Remote`."""
        try:
            self._depot.create()
            self._depot.receive(record, fetch)
        except (PermissionError, NotADirectoryError) as error:
            raise RemoteError(
                f"{self._depot.root}: cannot be written ({error.strerror}); give another folder"
            ) from None


def read_file(depot: Depot, record: Record, path: str) -> bytes:
    """The bytes of one file of a record in a depot, hashed.

    Raises:
        CorruptAdapterError: If they are missing or not the recorded ones.
    """
    entry = next((entry for entry in record.files if entry.path == path), None)
    if entry is None:
        raise CorruptAdapterError(f"{record.ref}: the record lists no {path}; pull it again from another hub")
    return depot.blobs.read(entry.sha256, f"{record.ref} {path}")


def _open_directory(address: str) -> Remote:
    """The hub to push to: the folder itself, an existing hub, an empty folder or a missing one."""
    folder = _folder(address)
    if not is_hub(folder):
        outer = next((parent for parent in folder.parents if is_hub(parent)), None)
        if outer is not None:
            raise RemoteError(
                f"{address}: lies inside the hub {outer}; push to file://{outer.as_posix()}, or make a hub of its own "
                f"there first: hub init {folder}"
            )
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RemoteError(f"{address}: exists and is not a hub; give a hub, an empty folder or a new one")
    return DirectoryRemote(folder)


def _split_directory(address: str) -> tuple[Remote, AdapterRef]:
    """The hub and the reference in `file:///dir/name@1`: the longest part that is a hub, and the rest."""
    folder = _folder(address)
    for parent in folder.parents:
        if is_hub(parent):
            return DirectoryRemote(parent), AdapterRef.parse(folder.relative_to(parent).as_posix())
    raise RemoteError(f"{address}: no hub on this path; wanted file:///folder/of/a/hub/name, or name@version")


def _folder(address: str) -> Path:
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise RemoteError(f"{address}: names a host or a relative path; wanted file:///absolute/folder")
    path = url2pathname(parts.path) if os.name == "nt" else unquote(parts.path)
    return Path(os.path.normpath(path))


_OPEN: Mapping[str, Callable[[str], Remote]] = {"file": _open_directory}
_SPLIT: Mapping[str, Callable[[str], tuple[Remote, AdapterRef]]] = {"file": _split_directory}


def open_remote(address: str) -> Remote:
    """The remote to push to.

    Raises:
        RemoteError: If the scheme is unknown or the address is not a hub and cannot become one.
    """
    return _OPEN[_scheme(address)](address)


def split_remote_ref(address: str) -> tuple[Remote, AdapterRef]:
    """The remote and the reference of an address such as `file:///dir/sst2@1`.

    Raises:
        RemoteError: If the scheme is unknown or there is no hub.
        InvalidNameError: If the rest is not a reference.
    """
    return _SPLIT[_scheme(address)](address)


def _scheme(address: str) -> str:
    scheme = address.partition("://")[0] if "://" in address else ""
    if scheme not in _OPEN:
        known = ", ".join(f"{name}://" for name in _OPEN)
        raise RemoteError(
            f"{address!r:.200} is not a remote; wanted an address that starts with {known}, e.g. file:///dir"
        )
    return scheme
