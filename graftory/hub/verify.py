"""Verifying a hub: every byte, every record, every reference, and the index made from them.

A damaged file ends nothing: all of the hub is looked at, and everything that is wrong is said, with what
to do about it. Nothing is locked while bytes are hashed, so others may write meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftory.adapter import AdapterRef
from graftory.errors import CorruptAdapterError, GraftoryError
from graftory.hub import index, pending
from graftory.hub.completeness import Gap, gaps
from graftory.hub.contents import check_contents, check_file_names
from graftory.hub.depot import Depot
from graftory.hub.files import sha256_of
from graftory.hub.records import Record, is_name
from graftory.hub.remotes.base import Progress, silent
from graftory.hub.resolve import resolve

if TYPE_CHECKING:
    from graftory.hub.keys import PublicKey

_PULL = "pull it again from another hub"
_REBUILD = "hub verify --rebuild makes it anew"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        ref: The version it concerns; None if it concerns the hub.
        where: The file, below the hub's root.
        what: What is wrong.
        remedy: What to do.
    """

    ref: str | None
    where: str
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found.

    Attributes:
        versions: Versions looked at.
        files: Files hashed, each once.
        size: Bytes of these files.
        problems: What is wrong; empty if all is well.
        leftovers: Blobs that no version needs; hub gc removes them.
        gaps: What is not recorded, by version; None if it was not asked for.
        signed: The key of the signature found, by version; None if no keys were given.
    """

    versions: int
    files: int
    size: int
    problems: tuple[Problem, ...]
    leftovers: int
    gaps: Mapping[str, tuple[Gap, ...]] | None = None
    signed: Mapping[str, str] | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


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
    chosen = [resolve(depot, ref) for ref in refs]
    wanted = chosen or [
        AdapterRef(name, version=v) for name in depot.records.names() for v in depot.records.versions(name)
    ]
    problems: list[Problem] = []
    records = _records(depot, wanted, problems)
    blobs = _Blobs(depot, records, progress)
    for record in records:
        problems += _contents(depot, record, blobs)
        problems += _parents(depot, record)
    signed = _signed(depot, records, keys, problems) if keys else None
    if not refs:
        problems += [*_aliases(depot), *_index(depot)]
    return Report(
        versions=len(wanted),
        files=len(blobs.hashes),
        size=blobs.done,
        problems=tuple(problems),
        leftovers=0 if refs else _leftovers(depot, records, problems),
        gaps={str(record.ref): gaps(record) for record in records} if complete else None,
        signed=signed,
    )


class _Blobs:
    """The hashes of the blobs of some records, each computed once, when it is asked for."""

    def __init__(self, depot: Depot, records: Iterable[Record], progress: Progress) -> None:
        self.depot, self.progress = depot, progress
        self.total = sum({entry.sha256: entry.size for record in records for entry in record.files}.values())
        self.done = 0
        self.hashes: dict[str, str | None] = {}

    def hash_of(self, sha256: str, what: str) -> str | None:
        """The hash that a blob has; None if it is not there."""
        if sha256 not in self.hashes:
            path = self.depot.blobs.path(sha256)
            try:
                self.hashes[sha256] = sha256_of(path)
                self.done += path.stat().st_size
            except FileNotFoundError:
                self.hashes[sha256] = None
            self.progress(what, self.done, self.total)
        return self.hashes[sha256]


def _records(depot: Depot, refs: Iterable[AdapterRef], problems: list[Problem]) -> list[Record]:
    """The records that can be read; the others become problems."""
    records = []
    for ref in refs:
        path = depot.records.path(ref.name, ref.version or 0)
        try:
            record = depot.records.read(ref.name, ref.version or 0)
            check_file_names(record)
        except (GraftoryError, OSError) as error:
            problems.append(Problem(str(ref), _below(depot, path), _cause(error), _PULL))
        else:
            records.append(record)
    return records


def _contents(depot: Depot, record: Record, blobs: _Blobs) -> Iterator[Problem]:
    """Whether the files are there, are the recorded ones, and hold what the record lists."""
    sound = True
    for entry in record.files:
        got = blobs.hash_of(entry.sha256, f"{record.ref} {entry.path}")
        if got != entry.sha256:
            sound = False
            what = "is missing" if got is None else f"has sha256:{got[:12]}…, recorded is sha256:{entry.sha256[:12]}…"
            where = _below(depot, depot.blobs.path(entry.sha256))
            yield Problem(str(record.ref), where, f"{entry.path} {what}", _PULL)
    if sound:
        try:
            files = {entry.path: depot.blobs.map(entry.sha256, str(record.ref)) for entry in record.files}
            check_contents(record, files, allow_nonfinite=True)
        except GraftoryError as error:
            path = depot.records.path(record.name, record.version)
            yield Problem(str(record.ref), _below(depot, path), _cause(error), _PULL)


def _parents(depot: Depot, record: Record) -> Iterator[Problem]:
    """Whether the adapters that it is composed of are here; it does not work without them."""
    for parent in record.spec.lineage.parents:
        if parent.relation != "composed":
            continue
        try:
            found = depot.records.find(parent.digest, parent.ref.partition("@")[0])
        except CorruptAdapterError:
            continue  # a damaged record is a problem of its own
        if found is None:
            where = _below(depot, depot.records.path(record.name, record.version))
            yield Problem(
                str(record.ref), where, f"it is composed of {parent.ref}, which is not here", f"pull {parent.ref}"
            )


def _signed(
    depot: Depot, records: Iterable[Record], keys: Sequence[PublicKey], problems: list[Problem]
) -> dict[str, str]:
    from graftory.hub.signing import check_signature

    signed = {}
    for record in records:
        try:
            signed[str(record.ref)] = check_signature(depot, record, keys).key
        except GraftoryError as error:  # noqa: PERF203 (each version is judged alone)
            where = f".hub/signatures/{record.name}/{record.version}"
            problems.append(Problem(str(record.ref), where, _cause(error), "get it from its author again"))
    return signed


def _aliases(depot: Depot) -> Iterator[Problem]:
    """Whether the logs can be read and mean versions that are here."""
    home = depot.folder / "aliases"
    for path in sorted(home.rglob("*.jsonl")):
        name = path.relative_to(home).with_suffix("").as_posix()
        where = _below(depot, path)
        if not is_name(name):
            yield Problem(None, where, "its name is no adapter's", "remove it")
            continue
        try:
            moves = depot.aliases.log(name)
        except (GraftoryError, OSError) as error:
            yield Problem(None, where, _cause(error), "remove the damaged line, then hub verify --rebuild")
            continue
        missing = sorted({move.version for move in moves} - set(depot.records.versions(name)))
        if missing:
            yield Problem(None, where, f"an alias means {name}@{missing[0]}, which is not here", _PULL)


def _index(depot: Depot) -> Iterator[Problem]:
    """Whether `registry.json` is what the records and alias logs make; looked at again under the lock."""
    if _index_is_right(depot):
        return
    with depot.lock():
        if pending.read(depot.pending_path) != ():
            return  # a writer was broken off: readers know which rows are old, and the next writer mends them
        try:
            right = _index_is_right(depot)
        except (GraftoryError, OSError):
            return
    if not right:
        yield Problem(None, depot.index_path.name, "is not what the records and alias logs make", _REBUILD)


def _index_is_right(depot: Depot) -> bool:
    try:
        wanted = index.index_bytes(index.make_index(depot.records, depot.aliases))
    except CorruptAdapterError:
        return True  # it cannot be known; the damaged record or log is a problem of its own
    return depot.index_path.is_file() and depot.index_path.read_bytes() == wanted


def _leftovers(depot: Depot, records: Iterable[Record], problems: Sequence[Problem]) -> int:
    if any(problem.ref and problem.where.startswith(".hub/records") for problem in problems):
        return 0  # a record that cannot be read may need them
    needed = {entry.sha256 for record in records for entry in record.files}
    return sum(sha256 not in needed for sha256 in depot.blobs.all())


def _below(depot: Depot, path: object) -> str:
    text = str(path)
    return text.removeprefix(str(depot.root)).lstrip("/\\").replace("\\", "/")


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())
