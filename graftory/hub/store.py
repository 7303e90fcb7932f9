"""Blobs by their hash: `blobs/sha256/ab/abcd...`. Written once, hashed on every read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from graftory.errors import CorruptAdapterError
from graftory.hub.files import write_atomic


@dataclass(frozen=True, slots=True)
class BlobStore:
    """The blobs of one hub.

    Attributes:
        folder: The hub's `.hub` folder.
    """

    folder: Path

    def path(self, sha256: str) -> Path:
        """Where a blob lies, or would lie."""
        return self.folder / "blobs" / "sha256" / sha256[:2] / sha256

    def write(self, data: bytes) -> str:
        """Keep `data` and return its sha256; durable when this returns. Bytes already there are not
        written again, unless they were damaged since."""
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.has(sha256):
            write_atomic(self.path(sha256), data, self.folder / "tmp")
        return sha256

    def has(self, sha256: str) -> bool:
        """Whether the blob is there, intact."""
        path = self.path(sha256)
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256

    def read(self, sha256: str, what: str) -> bytes:
        """The bytes of a blob, hashed before they are returned.

        Args:
            sha256: The recorded hash.
            what: What the bytes are, for the error text.

        Raises:
            CorruptAdapterError: If the blob is missing or its bytes are not the recorded ones.
        """
        try:
            data = self.path(sha256).read_bytes()
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
