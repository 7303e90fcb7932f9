"""Objects behind fsspec: read, list, upload, and create only where nothing is."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from graftory.errors import RemoteError
from graftory.hub.redact import redact
from graftory.hub.remotes.objects_errors import describe, in_our_words, names_of

PART = 8 << 20
"""Bytes of one request when a file is fetched or sent in parts (8 MiB)."""
_BATCH = 32
_TRIES = 6
_TAKEN = {"PreconditionFailed", "412", "FileExistsError", "ConditionNotMet", "BlobAlreadyExists"}
_RACE = {"ConditionalRequestConflict", "OperationAborted", "409"}
_UNKNOWN = {"NotImplemented", "501", "NotImplementedError"}
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
_BEYOND = {"InvalidRange", "416", "RequestedRangeNotSatisfiable"}


class ConditionUnknownError(RemoteError):
    """A store that does not know how to create an object only where nothing is."""


@dataclass(frozen=True, slots=True)
class Stat:
    """What is known of an object without trust in its name.

    Attributes:
        size: Its bytes.
        sha256: Their hash, as noted by the upload that wrote both at once; None if nothing is noted.
    """

    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Kind:
    """What differs between stores.

    Attributes:
        install: What to install, where the file system is missing.
        create: Creates an object or raises that it exists; the store decides between two writers.
        stat: Size and hash of an object.
        upload: Arguments of `put_file` for a file with some hash.
    """

    install: str
    create: Callable[[Any, str, bytes], None]
    stat: Callable[[Any, str], Stat]
    upload: Callable[[str], dict[str, Any]]


_ONE = threading.Lock()


def _create(fs: Any, path: str, data: bytes) -> None:
    fs.pipe_file(path, data, mode="create")


def _create_alone(fs: Any, path: str, data: bytes) -> None:
    with _ONE:
        if fs.exists(path):
            raise FileExistsError(path)
        fs.pipe_file(path, data)


def _stat_s3(fs: Any, path: str) -> Stat:
    bucket, key, _ = fs.split_path(path)
    head = fs.call_s3("head_object", Bucket=bucket, Key=key)
    return Stat(head["ContentLength"], head.get("Metadata", {}).get("sha256"))


def _stat_gs(fs: Any, path: str) -> Stat:
    info = fs.info(path)
    return Stat(info["size"], (info.get("metadata") or {}).get("sha256"))


def _stat_by_reading(fs: Any, path: str) -> Stat:
    size, digest = int(fs.info(path)["size"]), hashlib.sha256()
    for start in range(0, size, PART):
        digest.update(fs.cat_file(path, start=start, end=min(start + PART, size)))
    return Stat(size, digest.hexdigest())


def _noted(key: str, sha256: str) -> dict[str, Any]:
    return {key: {"sha256": sha256}, "chunksize": PART}


def _nothing_noted(_sha256: str) -> dict[str, Any]:
    return {}


KINDS: Mapping[str, Kind] = {
    # If-None-Match: *
    "s3": Kind("graftory[s3]", _create, _stat_s3, partial(_noted, "Metadata")),
    # ifGenerationMatch=0
    "gs": Kind("gcsfs", _create, _stat_gs, partial(_noted, "metadata")),
    # If-None-Match: *; adlfs keeps the metadata for itself
    "az": Kind("adlfs", _create, _stat_by_reading, _nothing_noted),
    # one lock: it never leaves the process
    "memory": Kind("fsspec", _create_alone, _stat_by_reading, _nothing_noted),
}


@dataclass(frozen=True, slots=True)
class Bucket:
    """The objects under one address; keys are relative to it.

    Attributes:
        address: For people.
        root: The same as the file system writes it.
        kind: What is particular about the store.
        fs: The fsspec file system.
    """

    address: str
    root: str
    kind: Kind
    fs: Any

    @classmethod
    def open(cls, address: str) -> Bucket:
        """The objects under an address. Nothing is asked yet.

        Raises:
            RemoteError: If the address holds a secret or is none, or the file system is not installed.
        """
        address = check_address(address)
        scheme = address.partition("://")[0]
        kind = KINDS[scheme]
        from fsspec import filesystem

        try:
            with in_our_words(address):
                # an instance of its own: other writers and a changed environment are seen
                fs = filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
                return cls(address, fs._strip_protocol(address), kind, fs)
        except RemoteError:
            if _is_missing(scheme):
                raise RemoteError(
                    f"{address}: {scheme}:// needs another package; install it: pip install '{kind.install}'"
                ) from None
            raise

    def below(self, count: int) -> tuple[Bucket, str] | None:
        """The objects some parts further up, and those parts; None where there are none."""
        scheme, _, path = self.address.partition("://")
        parts = path.split("/")
        if len(parts) <= count:
            return None
        address = f"{scheme}://{'/'.join(parts[:-count])}"
        root = self.root.rsplit("/", count)[0]
        return replace(self, address=address, root=root), "/".join(parts[-count:])

    def alone(self) -> Bucket:
        """The same for one writer at a time: whether something is there is looked up, not left to the store."""
        return replace(self, kind=replace(self.kind, create=_create_alone))

    def read(self, key: str, length: int, start: int = 0) -> bytes | None:
        """At most `length` bytes of an object from `start`; None if there is no object."""
        with in_our_words(self.address):
            try:
                data: bytes = self.fs.cat_file(self._path(key), start=start, end=start + length)
            except Exception as error:
                return _read_error(error)
        if len(data) > length:
            raise RemoteError(f"{self.address}: the server does not know ranges; use another one")
        return data

    def read_many(self, keys: Sequence[str], length: int) -> Iterator[tuple[str, bytes]]:
        """The first bytes of objects, many at once; objects that vanished are left out."""
        for begin in range(0, len(keys), _BATCH):
            batch = keys[begin : begin + _BATCH]
            with in_our_words(self.address):
                paths = [self._path(key) for key in batch]
                found = self.fs.cat_ranges(paths, 0, length, on_error="return")
                parts = [_read_error(data) if isinstance(data, Exception) else data for data in found]
            yield from ((key, data) for key, data in zip(batch, parts, strict=True) if data is not None)

    def create(self, key: str, data: bytes) -> bool:
        """Make an object unless one is there; False if one is. Of several writers one gets True.

        An answer that was lost on the way looks as if somebody else had been first: compare the bytes.

        Raises:
            ConditionUnknownError: If the store says that it cannot do that.
        """
        for attempt in range(_TRIES):
            with in_our_words(self.address):
                try:
                    self.kind.create(self.fs, self._path(key), data)
                except Exception as error:
                    names = names_of(error)
                    if _TAKEN & set(names):
                        return False
                    if _UNKNOWN & set(names):
                        raise ConditionUnknownError(f"{self.address}: {describe(error)}") from None
                    if not _RACE & set(names) or attempt == _TRIES - 1:
                        raise
                else:
                    return True
            time.sleep(0.05 * 2**attempt)  # two writers at the same instant: S3 asks both to come again
        raise AssertionError

    def stat(self, key: str) -> Stat | None:
        """Size and hash of an object; None if there is none."""
        with in_our_words(self.address):
            try:
                return self.kind.stat(self.fs, self._path(key))
            except Exception as error:
                _read_error(error)
                return None

    def upload(self, key: str, path: Path, sha256: str, progress: Callable[[int], None]) -> None:
        """Put a file there, in parts if it is large. The object appears at once, when all of it is there."""
        from fsspec.callbacks import Callback

        def report(_size: int, value: int, **_: object) -> None:
            if value:
                progress(value)

        callback = Callback(hooks={"progress": report})
        with in_our_words(self.address):
            self.fs.put_file(str(path), self._path(key), callback=callback, **self.kind.upload(sha256))

    def keys(self, folder: str) -> list[str]:
        """The keys of every object below a folder, relative to it, sorted."""
        top = self._path(folder)
        with in_our_words(self.address):
            try:
                found = self.fs.find(top)
            except Exception as error:
                _read_error(error)
                return []
        return sorted(path.removeprefix(f"{top}/") for path in found if path.startswith(f"{top}/"))

    def is_empty(self) -> bool:
        """Whether nothing at all is below the address."""
        with in_our_words(self.address):
            try:
                found = self.fs.ls(self.root, detail=False)
                return not [path for path in found if path.rstrip("/") != self.root]  # a console's mark of a folder
            except Exception as error:
                _read_error(error)
                return True

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"


def _read_error(error: Exception) -> bytes | None:
    """None for an object that is not there, no bytes for a range behind its end; else the error again."""
    names = set(names_of(error))
    if names & _BEYOND:
        return b""
    if isinstance(error, FileNotFoundError) and not names & _NO_BUCKET:
        return None
    raise error


def _is_missing(scheme: str) -> bool:
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(scheme)
    except ImportError:
        return True
    return False


_ADDRESS = re.compile(r"(?P<scheme>[a-z0-9]+)://(?P<path>[^/@%]+(?:/[^/]+)*)/*")


def check_address(address: str) -> str:
    """The address without slashes at its end.

    Raises:
        RemoteError: If it holds a user, options or an empty part; the text does not repeat what may be a secret.
    """
    scheme, _, rest = address.partition("://")
    host = rest.partition("/")[0]
    keys = ":" in host and not host.startswith("arn:")
    if keys or "@" in host or "%" in host or re.search(r"[?#\\]", address):
        raise RemoteError(
            f"the {scheme:.20} address holds a user, a key or options; give {scheme:.20}://bucket/prefix: credentials "
            "come from the environment or the configuration of the store's own client"
        )
    match = _ADDRESS.fullmatch(address)
    if match is None or not address.isprintable() or {".", ".."} & set(rest.split("/")):
        raise RemoteError(
            f"{redact(address)!r:.200} is not the address of objects; wanted {scheme:.20}://bucket/prefix"
        )
    return f"{scheme}://{match['path']}"
