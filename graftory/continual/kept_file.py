"""What a strategy keeps, on disk: tensors in safetensors, everything else as JSON in the same file's metadata."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from graftory.continual.files import write_atomically
from graftory.continual.strategies.base import NOTHING, Kept
from graftory.errors import CorruptAdapterError
from graftory.schema import canonical

_FORMAT = "graftory-kept-1"


def save_kept(kept: Kept, path: Path) -> str:
    """Write it, all or nothing.

    Returns:
        sha256 of the file; empty if there is nothing to keep, and no file.
    """
    if not kept.tensors and not kept.values:
        return ""
    tensors = {name: kept.tensors[name].contiguous() for name in sorted(kept.tensors)}
    # one entry: several would come in an order of their own every time, and the hash is to be the same again
    header = canonical({"format": _FORMAT, "values": kept.values}).decode()
    content = save(tensors, metadata={"graftory": header})
    write_atomically(path, content)
    return _hash(content)


def load_kept(path: Path, digest: str) -> Kept:
    """Read it.

    Args:
        path: The file.
        digest: What `save_kept` returned.

    Raises:
        CorruptAdapterError: If the file is not that one.
    """
    if not digest:
        return NOTHING
    try:
        if _hash(path.read_bytes()) != digest:
            raise CorruptAdapterError(
                f"{path} is not what was kept at its step; run the sequence again in a new folder"
            )
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["graftory"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            return Kept(tensors, header["values"])
    except (OSError, SafetensorError, KeyError) as error:
        raise CorruptAdapterError(f"{path} cannot be read ({error}); run the sequence again in a new folder") from error


def _hash(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
