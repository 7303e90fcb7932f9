"""Verifying a hub: every byte, every record, every reference, and the index made from them.

A damaged file ends nothing: all of the hub is looked at, and everything that is wrong is said, with what
to do about it. Nothing is locked while bytes are hashed, so others may write meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graftory.adapter import AdapterRef, Parent
from graftory.errors import CorruptAdapterError, GraftoryError
from graftory.hub.codecs import codec_of
from graftory.hub.completeness import Gap, gaps
from graftory.hub.contents import check_file_names
from graftory.hub.depot import Depot
from graftory.hub.files import map_file
from graftory.hub.gc import Removed, strays
from graftory.hub.hashes import Hashes
from graftory.hub.hub_checks import check_aliases, check_index, leftovers
from graftory.hub.records import FileEntry, Record
from graftory.hub.report import PULL, PUT_ASIDE, Problem, Report, below, cause
from graftory.hub.resolve import resolve
from graftory.hub.signature_form import fault_of
from graftory.progress import Progress, silent

if TYPE_CHECKING:
    from graftory.hub.keys import PublicKey

_AHEAD = 8
"""Versions whose files are being hashed while the tensors of an earlier one are checked."""


def verify(
    depot: Depot,
    refs: Sequence[str | AdapterRef] = (),
    *,
    complete: bool = False,
    keys: Sequence[PublicKey] = (),
    progress: Progress = silent,
) -> Report:
    """Check versions, or the whole hub.

    Args:
        depot: The hub.
        refs: The versions to check; all of them, the aliases and the index too, if there are none.
        complete: Whether to list what the records lack.
        keys: Public keys; a version that none of them signed is a problem then.
        progress: Told of the bytes hashed.

    Raises:
        AdapterNotFoundError: If a reference names nothing here.
    """
    found = _Found()
    wanted = _chosen(depot, refs, found.problems) if refs else _all(depot)
    total = _size_of(depot, wanted if refs else ())
    with Hashes(depot.blobs, total, progress) as hashes:
        for record in _ahead(_records(depot, wanted, found), hashes):
            found.problems += _contents(depot, record, hashes)
            found.problems += _signatures(depot, record)
            if complete:
                found.gaps[str(record.ref)] = gaps(record)
            if keys:
                _signed(depot, record, keys, found)
    _parents(depot, found, whole=not refs)
    left: tuple[Removed, ...] = ()
    if not refs:
        found.problems += [*check_aliases(depot), *check_index(depot)]
        found.notes += [
            Problem(None, below(depot, path), "is no file of a hub", "remove it if nobody needs it")
            for path in strays(depot)
        ]
        left = leftovers(depot, found.needs)
    return Report(
        versions=len(wanted),
        files=hashes.files,
        size=hashes.done,
        problems=tuple(found.problems),
        notes=tuple(found.notes),
        leftovers=left,
        gaps=found.gaps if complete else None,
        signed=found.signed if keys else None,
    )


@dataclass(slots=True)
class _Found:
    """What has been seen so far; of a record only what is needed later, as a hub may hold very many."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    gaps: dict[str, tuple[Gap, ...]] = field(default_factory=dict)
    signed: dict[str, str] = field(default_factory=dict)
    needs: dict[AdapterRef, frozenset[str]] = field(default_factory=dict)
    digests: set[str] = field(default_factory=set)
    parents: list[tuple[AdapterRef, Parent]] = field(default_factory=list)

    def see(self, record: Record) -> None:
        """Remember what is needed of a record."""
        self.needs[record.ref] = frozenset(entry.sha256 for entry in record.files)
        self.digests.add(record.digest)
        self.parents += [(record.ref, parent) for parent in record.spec.lineage.parents]


def _all(depot: Depot) -> list[AdapterRef]:
    return [AdapterRef(name, version=v) for name in depot.records.names() for v in depot.records.versions(name)]


def _chosen(depot: Depot, refs: Iterable[str | AdapterRef], problems: list[Problem]) -> list[AdapterRef]:
    """The versions that references mean; a damaged file on the way is a problem."""
    chosen: dict[AdapterRef, None] = {}
    for ref in refs:
        try:
            chosen[resolve(depot, ref)] = None
        except CorruptAdapterError as error:  # noqa: PERF203 (each is judged alone)
            problems.append(Problem(str(ref), depot.folder.name, cause(error), "hub verify tells all that is wrong"))
    return list(chosen)


def _size_of(depot: Depot, refs: Sequence[AdapterRef]) -> int:
    """About how many bytes there are to hash: of some versions, or of everything."""
    hashes = set() if refs else set(depot.blobs.all())
    for ref in refs:
        try:
            hashes.update(entry.sha256 for entry in depot.records.read(ref.name, ref.version or 0).files)
        except (GraftoryError, OSError):  # noqa: PERF203 (told of when the version's turn comes)
            continue
    return sum(_size(depot, sha256) for sha256 in hashes)


def _size(depot: Depot, sha256: str) -> int:
    try:
        return depot.blobs.path(sha256).stat().st_size
    except (GraftoryError, OSError):
        return 0


def _records(depot: Depot, refs: Iterable[AdapterRef], found: _Found) -> Iterator[Record]:
    """The records that can be read; the others become problems."""
    for ref in refs:
        try:
            record = depot.records.read(ref.name, ref.version or 0)
            check_file_names(record)
            for entry in record.files:
                depot.blobs.path(entry.sha256)
        except (GraftoryError, OSError) as error:  # noqa: PERF203 (each is judged alone)
            where = below(depot, depot.records.path(ref.name, ref.version or 0))
            found.problems.append(Problem(str(ref), where, cause(error), PUT_ASIDE))
        else:
            found.see(record)
            yield record


def _ahead(records: Iterator[Record], hashes: Hashes) -> Iterator[Record]:
    """The same records, a few of them held back while their files are being hashed."""
    waiting: deque[Record] = deque()
    for record in records:
        for entry in record.files:
            hashes.begin(entry.sha256, f"{record.ref} {entry.path}")
        waiting.append(record)
        if len(waiting) > _AHEAD:
            yield waiting.popleft()
    yield from waiting


def _contents(depot: Depot, record: Record, hashes: Hashes) -> Iterator[Problem]:
    """Whether the files are there, are the recorded ones, and hold what the record lists."""
    faults = [_fault(depot, record, entry, hashes) for entry in record.files]
    yield from (fault for fault in faults if fault is not None)
    if any(faults):
        return
    where = below(depot, depot.records.path(record.name, record.version))
    try:
        files = {entry.path: map_file(depot.blobs.path(entry.sha256)) for entry in record.files}
        tensors = codec_of(record.spec).check(files, record.spec)
    except (GraftoryError, OSError) as error:
        yield Problem(str(record.ref), where, cause(error), PUT_ASIDE)
    else:
        if tensors != record.tensors:
            yield Problem(str(record.ref), where, "lists other tensors than its files hold; it is forged", PUT_ASIDE)


def _fault(depot: Depot, record: Record, entry: FileEntry, hashes: Hashes) -> Problem | None:
    """What is wrong with the bytes of a file."""
    ref, path = str(record.ref), depot.blobs.path(entry.sha256)
    try:
        got, size = hashes.begin(entry.sha256, entry.path).result()
    except FileNotFoundError:
        return Problem(ref, below(depot, path), f"{entry.path} is missing", PULL)
    except OSError as error:
        return Problem(ref, below(depot, path), f"{entry.path} cannot be read ({error.strerror})", PUT_ASIDE)
    if got != entry.sha256:
        what = f"{entry.path} has sha256:{got[:12]}…, recorded is sha256:{entry.sha256[:12]}…"
        return Problem(ref, below(depot, path), what, PULL)
    if size != entry.size:
        where = below(depot, depot.records.path(record.name, record.version))
        what = f"{entry.path} has {size} bytes, recorded are {entry.size}; the record is forged"
        return Problem(ref, where, what, PUT_ASIDE)
    return None


def _signatures(depot: Depot, record: Record) -> Iterator[Problem]:
    """Whether the signatures have the form of one and are of this version; only a key tells whether they are good."""
    home = depot.folder / "signatures" / record.name / str(record.version)
    try:
        found = depot.signatures.of(record.name, record.version)
    except OSError as error:
        yield Problem(str(record.ref), below(depot, home), cause(error), "mend the disk, or remove it")
        return
    for key_id, data in found.items():
        fault = fault_of(record, key_id, data)
        if fault is not None:
            where = below(depot, home / f"{key_id}.json")
            yield Problem(str(record.ref), where, fault, "remove it, then pull the version again from its author")


def _signed(depot: Depot, record: Record, keys: Sequence[PublicKey], found: _Found) -> None:
    """Whether one of the keys signed the version."""
    from graftory.hub.signing import check_signature

    try:
        found.signed[str(record.ref)] = check_signature(depot, record, keys).key
    except (GraftoryError, OSError) as error:
        where = f".hub/signatures/{record.name}/{record.version}"
        found.problems.append(Problem(str(record.ref), where, cause(error), "get it from its author again"))


def _parents(depot: Depot, found: _Found, *, whole: bool) -> None:
    """Whether the adapters are here that others were made from; those that one is composed of it needs."""
    missing = [(ref, parent) for ref, parent in found.parents if parent.digest not in found.digests]
    if missing and whole:  # it may have come while bytes were hashed
        for late in (ref for ref in _all(depot) if ref not in found.needs):
            try:
                found.see(depot.records.read(late.name, late.version or 0))
            except (GraftoryError, OSError):  # noqa: PERF203 (a problem of its own)
                continue
    for ref, parent in missing:
        where = below(depot, depot.records.path(ref.name, ref.version or 0))
        try:
            name = parent.ref.partition("@")[0]
            here = parent.digest in found.digests or (not whole and depot.records.find(parent.digest, name) is not None)
            what = f"{parent.relation} of {parent.ref}, which is not here"
        except (GraftoryError, OSError) as error:
            here, what = False, f"{parent.relation} of {parent.ref}, which cannot be looked up: {cause(error)}"
        if not here and parent.relation == "composed":
            found.problems.append(Problem(str(ref), where, f"it is {what}", f"pull {parent.ref}"))
        elif not here:
            found.notes.append(Problem(str(ref), where, f"it is {what}", "nothing; it works without"))
