"""Hashing many files, each once, while something else is done with those that are hashed already."""

from __future__ import annotations

import errno
import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

from graftory.hub.store import BlobStore
from graftory.progress import Progress

_CHUNK = 1 << 20


class Hashes:
    """Hashes files, each once, two at a time, from reading them: a disk that fails is an error then, not a crash."""

    def __init__(self, blobs: BlobStore, total: int, progress: Progress) -> None:
        self.files = self.done = 0
        self._blobs, self._total, self._progress = blobs, total, progress
        self._futures: dict[str, Future[tuple[str, int]]] = {}
        self._lock, self._ended = Lock(), Event()
        self._pool = ThreadPoolExecutor(2)

    def __enter__(self) -> Hashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._pool.shutdown(cancel_futures=True)

    def begin(self, sha256: str, what: str) -> Future[tuple[str, int]]:
        """The hash and size that a blob has, as soon as they are known."""
        if sha256 not in self._futures:
            self._futures[sha256] = self._pool.submit(self._hash, self._blobs.path(sha256), what)
        return self._futures[sha256]

    def _hash(self, path: Path, what: str) -> tuple[str, int]:
        size, hashed = 0, hashlib.sha256()
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError(errno.EINVAL, "not an ordinary file", str(path))
        with path.open("rb") as file:
            while not self._ended.is_set() and (chunk := file.read(_CHUNK)):
                hashed.update(chunk)
                size += len(chunk)
                with self._lock:
                    self.done += len(chunk)
                    self._progress(what, self.done, max(self._total, self.done))
        with self._lock:
            self.files += 1
        return hashed.hexdigest(), size
