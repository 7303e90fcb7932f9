"""Versions of the libraries that took part, for the lineage."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

_LIBRARIES = ("graftory", "torch", "transformers", "peft")


def library_versions() -> dict[str, str]:
    """The installed versions of graftory, torch, transformers and peft; those not installed are left out."""
    versions = {name: _version(name) for name in _LIBRARIES}
    return {name: found for name, found in versions.items() if found is not None}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
