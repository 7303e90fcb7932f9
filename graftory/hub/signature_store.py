"""Where signatures lie: `signatures/<name>/<version>/<key id>.json`. What they say is `signing`'s affair."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from graftory.adapter import AdapterRef
from graftory.errors import SignatureError
from graftory.hub.files import create_exclusive

MAX_BYTES = 1 << 20
"""Most bytes of a signature file (1 MiB: a statement lists every ancestor)."""
_KEY_ID = re.compile(r"[0-9a-f]{16,64}")


@dataclass(frozen=True, slots=True)
class SignatureStore:
    """The signatures of one hub; bytes that travel with a version, checked only where a key is at hand.

    Attributes:
        folder: The hub's `.hub` folder.
    """

    folder: Path

    def of(self, name: str, version: int) -> dict[str, bytes]:
        """The signatures of a version, by the id of the key. A file above 1 MiB counts as empty."""
        home = self._home(name, version)
        found = sorted(path for path in home.glob("*.json") if _KEY_ID.fullmatch(path.stem)) if home.is_dir() else []
        return {path.stem: path.read_bytes() if path.stat().st_size <= MAX_BYTES else b"" for path in found}

    def add(self, name: str, version: int, key_id: str, data: bytes) -> bool:
        """Keep a signature; one of the same key that is there stays, and False is returned.

        Raises:
            SignatureError: If the id of the key or the size of the signature is impossible.
        """
        if not _KEY_ID.fullmatch(key_id) or len(data) > MAX_BYTES:
            raise SignatureError(
                f"{name}@{version}: got a signature of {len(data)} bytes by key {key_id!r:.80}; wanted at most "
                f"{MAX_BYTES} bytes and a key id of 16 to 64 hexadecimal digits; sign it again"
            )
        try:
            create_exclusive(self._home(name, version) / f"{key_id}.json", data, self.folder / "tmp")
        except FileExistsError:
            return False
        return True

    def _home(self, name: str, version: int) -> Path:
        ref = AdapterRef(name, version=version)
        return self.folder / "signatures" / ref.name / str(ref.version)
