"""Downloads on their way into a hub: `tmp/partial/<sha256>`, one writer each, continued after a break."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from graftory.errors import RemoteError
from graftory.hub.files import make_folder

WAIT_SECONDS = 300.0
"""How long one transfer waits for another that fetches the same file."""


@dataclass(frozen=True, slots=True)
class Staging:
    """The unfinished files of one hub. They are nothing until the hub adopts them.

    Attributes:
        folder: The hub's `.hub` folder.
    """

    folder: Path

    @property
    def home(self) -> Path:
        """The folder they lie in."""
        return self.folder / "tmp" / "partial"

    def path(self, sha256: str) -> Path:
        """Where a file with this hash is put together."""
        return self.home / sha256

    def discard(self, hashes: Iterable[str]) -> None:
        """Throw away what was put together; the caller holds it."""
        for sha256 in hashes:
            self.path(sha256).unlink(missing_ok=True)

    @contextmanager
    def hold(self, hashes: Iterable[str], *, wait: float = WAIT_SECONDS) -> Iterator[None]:
        """Keep other transfers, and the collection of garbage, away from some files.

        Args:
            hashes: The hashes of the files.
            wait: Seconds to wait for each.

        Raises:
            RemoteError: If another transfer has held one of them for that long.
        """
        with ExitStack() as stack:
            for sha256 in sorted(set(hashes)):  # in one order, so that two transfers never wait for each other
                stack.enter_context(self._hold(sha256, wait))
            yield

    @contextmanager
    def _hold(self, sha256: str, wait: float) -> Iterator[None]:
        from filelock import FileLock, Timeout

        make_folder(self.home)
        path = self.home / f"{sha256}.lock"
        lock = FileLock(str(path), timeout=wait)
        try:
            lock.acquire()
        except Timeout:
            raise RemoteError(f"{path}: another transfer fetches the same file; wait for it or end it") from None
        try:
            yield
        finally:
            with suppress(PermissionError):  # Windows keeps it
                path.unlink(missing_ok=True)  # while it is held: who waits for it notices and makes a new one
            lock.release()
