"""From a name that a client asks for to a folder that a server loads. Neither vLLM nor torch is needed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from graftory.adapter import AdapterRef
from graftory.errors import BaseMismatchError, CorruptAdapterError, DataError, VersionConflictError
from graftory.hub import Hub, Record

CACHE_VARIABLE = "VLLM_LORA_RESOLVER_CACHE_DIR"
"""vLLM's own: where resolvers keep adapters."""
BASE_VARIABLE = "GRAFTORY_SERVED_BASE"
"""What the hub's records call the base that is served, where the server calls it something else."""


@dataclass(frozen=True, slots=True)
class Served:
    """An adapter as a server can load it.

    Attributes:
        ref: The version that was meant.
        digest: Of that version.
        folder: Where its two files lie.
        id: A positive number of 60 bits, the same for the same digest anywhere.
    """

    ref: AdapterRef
    digest: str
    folder: Path
    id: int


def cache_folder() -> Path:
    """Where adapters are written: where vLLM's variable says, else the user's cache. Not made yet."""
    asked = os.environ.get(CACHE_VARIABLE)
    if asked:
        return Path(asked).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("graftory", appauthor=False) / "vllm"


def serve(hub: Hub, ref: str | AdapterRef, base: str, cache: Path, *, called: str | None = None) -> Served:
    """Write a version into a cache as vLLM wants it; every byte is hashed, and nothing of it is run.

    A version has a folder of its own, by its digest: once an alias moves, its name leads to another folder. Any number
    of processes may write the same one at once; it appears whole or not at all.

    Args:
        hub: The hub.
        ref: The version, in any of the four forms.
        base: The base as the server calls it: a name, or a folder.
        cache: The folder of the cache.
        called: What the hub's records call that base; the same by default.

    Raises:
        InvalidNameError: If the reference is none of the four forms.
        AdapterNotFoundError: If it names nothing in the hub.
        BaseMismatchError: If the adapter is for another base.
        UnsupportedAdapterError: If vLLM cannot take it.
        CorruptAdapterError: If the bytes in the hub, or those in the cache, are not the recorded ones.
    """
    record = hub.record(ref)
    check_served_base(hub, record, base, called or base)
    digest = record.digest.removeprefix("sha256:")
    # the base's name is in the files, so another name is another folder
    target = cache / "graftory" / f"{digest}-{sha256(base.encode()).hexdigest()[:12]}"
    folder = _write(hub, record, target, base)
    return Served(record.ref, record.digest, folder, int(digest[:15], 16) + 1)


def check_served_base(hub: Hub, record: Record, base: str, called: str) -> None:
    """Check that an adapter is for the base that a server has: by its name and, in a folder, by its files' headers.

    Args:
        hub: The hub.
        record: The adapter.
        base: The base as the server calls it.
        called: What the hub's records call it.

    Raises:
        BaseMismatchError: If it is for another one.
    """
    wanted = record.spec.base.id
    if called != wanted:
        raise BaseMismatchError(
            f"{record.ref} is for the base {wanted!r:.200}, the server has {base!r:.200}; if that is the same model, "
            f"say so: {BASE_VARIABLE}={wanted}"
        )
    if Path(base).is_dir():
        try:
            hub.check_base(record.ref, base)
        except DataError:
            return  # weights in another format than safetensors: the name alone has to do


def _write(hub: Hub, record: Record, target: Path, base: str) -> Path:
    try:
        return _write_once(hub, record, target, base)
    except OSError:
        # another process has put the whole folder there in between; if so, this finds the same files
        return _write_once(hub, record, target, base)


def _write_once(hub: Hub, record: Record, target: Path, base: str) -> Path:
    try:
        return hub.write_layout(record.ref, target, "vllm", served_base=base)
    except VersionConflictError:
        raise CorruptAdapterError(
            f"{target}: does not hold what {record.ref} is; somebody has changed the cache: remove that folder"
        ) from None
