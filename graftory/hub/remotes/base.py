"""What a remote is: a hub elsewhere, as `transfer` needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from graftory.hub.records import FileEntry, Record
from graftory.progress import Progress

Blobs = Callable[[FileEntry], Path]
"""Where a file of the local hub lies. It is not hashed: whoever keeps the bytes hashes them first."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """An adapter without a record, as PEFT's users upload it.

    Attributes:
        name: A name for it, made from where it lies.
        files: Its files.
        source: Where it lies, with the exact revision.
        licence: What its card says, if it says it plainly.
    """

    name: str
    files: tuple[FileEntry, ...]
    source: str
    licence: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)


class Remote(Protocol):
    """A hub elsewhere. No method changes a version that exists; every method can be repeated.

    Each may raise `RemoteError` for what the remote or the network between did, in one line and
    without a secret; `CorruptAdapterError` for a damaged record.
    """

    @property
    def address(self) -> str:
        """Where it is, for people to read; never with a secret."""

    def listing(self) -> Mapping[str, tuple[int, ...]]:
        """The names and their versions, ascending."""

    def record(self, ref: str) -> Record | Foreign:
        """What a reference, as it stands behind the address, means there.

        Raises:
            AdapterNotFoundError: If it means nothing there.
        """

    def find(self, digest: str, hint: str) -> Record | None:
        """The record with a digest, or None; `hint` is the name that it probably has."""

    def peek(self, item: Record | Foreign, entry: FileEntry, length: int) -> bytes:
        """The first bytes of a file, without the rest."""

    def fetch(self, item: Record | Foreign, entry: FileEntry, target: Path, progress: Callable[[int], None]) -> None:
        """Make a path hold the bytes of one file.

        Args:
            item: Whose file it is.
            entry: The file.
            target: The path. It may hold the beginning of the file from an earlier try; it is gone on with there.
            progress: Told how many bytes are there.

        Broken off, it leaves a beginning at `target`. The caller hashes.
        """

    def send(self, records: Sequence[Record], blobs: Blobs, progress: Progress) -> None:
        """Keep the last record; those before it are the parents it is composed of, ancestors first.

        The files come first, the record last. What is there already is left alone. Broken off at any
        point, it leaves no reference to what is not there.

        Raises:
            VersionConflictError: If the version exists with another digest; nothing is changed. Of
                several that send one version at the same time, exactly one gets through.
            CorruptAdapterError: If a file is not what its record says; nothing is referred to.
        """

    def aliases(self, name: str) -> Mapping[str, int]:
        """What each alias of a name means there."""

    def move_alias(self, name: str, alias: str, version: int) -> None:
        """Let an alias mean a version that exists there."""

    def signatures(self, record: Record) -> Mapping[str, bytes]:
        """The signatures of a version by the id of the key, as they are stored."""

    def add_signatures(self, record: Record, signatures: Mapping[str, bytes]) -> None:
        """Keep signatures of a version; one of the same key that is there stays."""
