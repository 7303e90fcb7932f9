"""Moving a version between this hub and a remote, with the parents it is composed of, aliases and signatures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from graftory.adapter import AdapterRef
from graftory.errors import AdapterNotFoundError
from graftory.hub.contents import check_file_names
from graftory.hub.depot import Depot
from graftory.hub.records import FileEntry, Record
from graftory.hub.remotes.base import Remote
from graftory.progress import Progress

_Find = Callable[[str, str], Record | None]


@dataclass(frozen=True, slots=True)
class Delivery:
    """What came of a push or a pull.

    Attributes:
        ref: The version; it has the same number on both sides.
        digest: Its digest.
        parents: The versions that it is composed of; they came along, or were there.
        aliases: The aliases that mean the version at the target now and travelled with it.
        kept: Aliases that mean another version at the target and were left alone, with that version.
        signatures: Ids of the keys whose signatures travelled.
        source: Where it was pulled from, for an adapter that had no record there.
    """

    ref: AdapterRef
    digest: str
    parents: tuple[AdapterRef, ...] = ()
    aliases: tuple[str, ...] = ()
    kept: Mapping[str, int] = field(default_factory=dict)
    signatures: tuple[str, ...] = ()
    source: str | None = None


def send(depot: Depot, remote: Remote, record: Record, *, move_aliases: bool, progress: Progress) -> Delivery:
    """Bring a version from this hub to a remote.

    Raises:
        AdapterNotFoundError: If a parent that it is composed of is in neither.
        CorruptAdapterError: If bytes are not the recorded ones.
        VersionConflictError: If the remote has the version with another digest.
        RemoteError: If the remote cannot be written.
    """
    records = closure(record, depot.records.find, remote.find)
    remote.send(records, lambda entry: depot.blobs.path(entry.sha256), progress)
    signatures: Mapping[str, bytes] = {}
    for item in records:
        signatures = depot.signatures.of(item.name, item.version)
        if signatures and _is_signed_there(item, remote.find(item.digest, item.name)):
            remote.add_signatures(item, signatures)
        else:
            signatures = {}
    moved, kept = _carry_aliases(
        record, depot.aliases.current(record.name), remote.aliases(record.name), remote.move_alias, move_aliases
    )
    return _delivery(records, moved, kept, tuple(signatures))


def receive(
    depot: Depot, remote: Remote, record: Record, *, allow_nonfinite: bool, move_aliases: bool, progress: Progress
) -> Delivery:
    """Bring a version from a remote to this hub.

    Raises:
        AdapterNotFoundError: If a parent that it is composed of is in neither.
        CorruptAdapterError: If the bytes there are not the recorded ones; nothing is kept.
        VersionConflictError: If this hub has the version with another digest.
        RemoteError: If the remote cannot be read.
    """
    records = closure(record, remote.find, depot.records.find)
    # read before anything is kept: damaged logs are no reason to keep half of it
    there, here = remote.aliases(record.name), depot.aliases.current(record.name)
    signatures: Mapping[str, bytes] = {}
    for item in records:
        depot.receive(item, partial(_fetch, remote, item, progress), allow_nonfinite=allow_nonfinite)
        fits = _is_signed_there(item, depot.records.read(item.name, item.version))
        signatures = remote.signatures(item) if fits else {}
        for key_id, data in signatures.items():
            depot.add_signature(item, key_id, data)
    moved, kept = _carry_aliases(record, there, here, depot.move_alias, move_aliases)
    return _delivery(records, moved, kept, tuple(signatures))


def _is_signed_there(record: Record, there: Record | None) -> bool:
    """Whether signatures of a version are of what lies at the target too.

    A version of the same digest may have been made there on its own: with the same files and specification, but with
    its own time in the record. Signatures are over the record's bytes, so they would be wrong there. A remote that
    keeps parents inside of what is composed of them does not find them by digest: it has those that were sent.
    """
    return there is None or there.source == record.source


def closure(record: Record, find: _Find, find_there: _Find) -> tuple[Record, ...]:
    """The parents that a version is composed of, ancestors first, and the version itself.

    Args:
        record: The version.
        find: Looks up a digest where the version comes from.
        find_there: Looks it up where it goes; a parent that is only there need not travel.

    Raises:
        AdapterNotFoundError: If a parent is in neither.
        CorruptAdapterError: If a record lists other files than its format has.
    """
    found: dict[str, Record] = {}

    def visit(item: Record) -> None:
        check_file_names(item)
        for parent in item.spec.lineage.parents:
            if parent.relation != "composed" or parent.digest in found:
                continue
            name = parent.ref.partition("@")[0]
            here = find(parent.digest, name)
            if here is not None:
                visit(here)
            elif find_there(parent.digest, name) is None:
                raise AdapterNotFoundError(f"{item.ref} is composed of {parent.ref}, which is missing; bring it first")
        found[item.digest] = item

    visit(record)
    return tuple(found.values())


def _fetch(remote: Remote, record: Record, progress: Progress, entry: FileEntry, target: Path) -> None:
    def report(done: int) -> None:
        progress(f"{record.ref} {entry.path}", done, entry.size)

    remote.fetch(record, entry, target, report)


def _carry_aliases(
    record: Record,
    here: Mapping[str, int],
    there: Mapping[str, int],
    move: Callable[[str, str, int], None],
    move_aliases: bool,
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Aliases of the version go along; one that means another version at the target is somebody's decision."""
    mine = [alias for alias, version in here.items() if version == record.version]
    kept = {alias: there[alias] for alias in mine if there.get(alias, record.version) != record.version}
    if move_aliases:
        kept = {}
    moved = tuple(alias for alias in mine if alias not in kept)
    for alias in moved:
        if there.get(alias) != record.version:
            move(record.name, alias, record.version)
    return moved, kept


def _delivery(
    records: tuple[Record, ...], aliases: tuple[str, ...], kept: Mapping[str, int], keys: tuple[str, ...]
) -> Delivery:
    *parents, record = records
    return Delivery(record.ref, record.digest, tuple(parent.ref for parent in parents), aliases, kept, keys)
