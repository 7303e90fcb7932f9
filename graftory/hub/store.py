"""Blobs by their hash: `blobs/sha256/ab/abcd...`. Written once, hashed on every read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from graftory.errors import CorruptAdapterError
from graftory.hub.files import adopt, map_file, sha256_of, write_atomic

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class BlobStore:
    """The blobs of one hub.

    Attributes:
        folder: The hub's `.hub` folder.
    """

    folder: Path

    def path(self, sha256: str) -> Path:
        """Where a blob lies, or would lie.

        Raises:
            CorruptAdapterError: If it is not 64 hexadecimal digits, as only a forged record has it.
        """
        if not _SHA256.fullmatch(sha256):
            raise CorruptAdapterError(f"{sha256!r:.80} is not a sha256; the record is forged, do not use it")
        return self.folder / "blobs" / "sha256" / sha256[:2] / sha256

    def all(self) -> Iterator[str]:
        """The hashes of all blobs, by the names of their files."""
        for path in sorted((self.folder / "blobs" / "sha256").glob("??/*")):
            if _SHA256.fullmatch(path.name) and path.parent.name == path.name[:2] and path.is_file():
                yield path.name

    def has(self, sha256: str) -> bool:
        """Whether the file is there; its bytes are not looked at."""
        return self.path(sha256).is_file()

    def is_intact(self, sha256: str) -> bool:
        """Whether the file is there and its bytes are the recorded ones."""
        try:
            return self.has(sha256) and sha256_of(self.path(sha256)) == sha256
        except FileNotFoundError:  # gc came between
            return False

    def write(self, data: bytes) -> str:
        """Keep `data` and return its sha256; durable when this returns. Bytes already there are not
        written again, unless they were damaged since."""
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.is_intact(sha256):
            write_atomic(self.path(sha256), data, self.folder / "tmp")
        return sha256

    def adopt(self, staged: Path, sha256: str) -> None:
        """Make a finished file of the same file system, already hashed, the blob; durable when this returns.

        Raises:
            FileNotFoundError: If the file is gone.
        """
        adopt(staged, self.path(sha256))

    def remove(self, sha256: str) -> None:
        """Remove a blob; the caller holds the hub's lock and knows that no record names it."""
        self.path(sha256).unlink(missing_ok=True)

    def map(self, sha256: str, what: str) -> memoryview:
        """The bytes of a blob, hashed before they are returned, not copied.

        Args:
            sha256: The recorded hash.
            what: What the bytes are, for the error text.

        Raises:
            CorruptAdapterError: If the blob is missing or its bytes are not the recorded ones.
        """
        try:
            if not self.has(sha256):  # nor is a folder or a pipe a blob
                raise FileNotFoundError
            data = map_file(self.path(sha256))
        except FileNotFoundError:
            raise CorruptAdapterError(
                f"{what}: blob sha256:{sha256[:12]}… is missing from {self.folder}; pull it again from another hub"
            ) from None
        got = hashlib.sha256(data).hexdigest()
        if got != sha256:
            raise CorruptAdapterError(
                f"{what}: {self.path(sha256)} has sha256:{got[:12]}…, recorded is sha256:{sha256[:12]}…; "
                "the file is damaged, pull it again from another hub"
            )
        return data
