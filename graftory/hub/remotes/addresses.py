"""From an address such as `file:///dir` to the remote behind it: a table by scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module

from graftory.errors import RemoteError
from graftory.hub.remotes.base import Remote


@dataclass(frozen=True, slots=True)
class Scheme:
    """A kind of remote: the module that knows it, imported when it is needed, and what an address looks like."""

    module: str
    example: str


_OBJECTS = "graftory.hub.remotes.objects"
SCHEMES: Mapping[str, Scheme] = {
    "file": Scheme("graftory.hub.remotes.directory", "file:///folder"),
    "hf": Scheme("graftory.hub.remotes.huggingface", "hf://org/repo"),
    "s3": Scheme(_OBJECTS, "s3://bucket/prefix"),
    "gs": Scheme(_OBJECTS, "gs://bucket/prefix"),
    "az": Scheme(_OBJECTS, "az://container/prefix"),
    "memory": Scheme(_OBJECTS, "memory://prefix"),
}
"""Each module has `open_remote(address)` and `split_remote_ref(address)`."""


def open_remote(address: str) -> Remote:
    """The remote to push to.

    Raises:
        RemoteError: If the scheme is unknown or the address is not a hub and cannot become one.
    """
    opener: Callable[[str], Remote] = import_module(_scheme(address).module).open_remote
    return opener(address)


def split_remote_ref(address: str) -> tuple[Remote, str]:
    """The remote and the reference of an address such as `file:///dir/sst2@1`.

    Raises:
        RemoteError: If the scheme is unknown or there is no hub.
        InvalidNameError: If the rest is not a reference.
    """
    splitter: Callable[[str], tuple[Remote, str]] = import_module(_scheme(address).module).split_remote_ref
    return splitter(address)


def _scheme(address: str) -> Scheme:
    name = address.partition("://")[0] if "://" in address else ""
    if name not in SCHEMES or not address.isprintable():
        examples = ", ".join(scheme.example for scheme in SCHEMES.values())
        raise RemoteError(f"{address!r:.200} is not a remote; wanted the name of one (hub remote list) or {examples}")
    return SCHEMES[name]
