"""From a reference as people write it to a version that exists."""

from __future__ import annotations

from graftory.adapter import AdapterRef
from graftory.errors import AdapterNotFoundError
from graftory.hub.depot import Depot


def resolve(depot: Depot, ref: str | AdapterRef) -> AdapterRef:
    """The `name@version` that a reference means now.

    Raises:
        InvalidNameError: If it is none of the four forms.
        AdapterNotFoundError: If it names nothing in the hub; close names are given.
    """
    wanted = AdapterRef.parse(ref) if isinstance(ref, str) else ref
    versions = depot.records.versions(wanted.name)
    if not versions:
        raise AdapterNotFoundError(f"no adapter {wanted.name!r} in {depot.root}; {_hint(wanted.name, depot)}")
    version = _version(depot, wanted, versions)
    if version not in versions:
        existing = ", ".join(map(str, versions[-10:]))
        raise AdapterNotFoundError(f"no {wanted} in {depot.root}; {wanted.name} has the versions {existing}")
    return AdapterRef(wanted.name, version=version)


def _version(depot: Depot, ref: AdapterRef, versions: tuple[int, ...]) -> int | None:
    if ref.alias is not None:
        aliases = depot.aliases.current(ref.name)
        if ref.alias not in aliases:
            known = ", ".join(aliases) or "none"
            raise AdapterNotFoundError(f"no alias {ref.alias!r} of {ref.name} in {depot.root}; its aliases: {known}")
        return aliases[ref.alias]
    if ref.digest is not None:
        return next((r.version for r in depot.records.of_name(ref.name) if r.digest == ref.digest), None)
    return ref.version if ref.version is not None else versions[-1]


def _hint(name: str, depot: Depot) -> str:
    from difflib import get_close_matches

    names = [row.name for row in depot.rows()]
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"it has {', '.join(names[:10])}{', …' if len(names) > 10 else ''}" if names else "it is empty"
