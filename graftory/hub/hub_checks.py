"""Checks of what belongs to a hub as a whole: alias logs, index, leftovers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from graftory.errors import CorruptAdapterError, GraftoryError, RemoteError
from graftory.hub import index, pending
from graftory.hub.depot import Depot
from graftory.hub.gc import Needs, Removed, clean, read_needs
from graftory.hub.records import is_name
from graftory.hub.report import PULL, Problem, below, cause

_REBUILD = "hub verify --rebuild makes it anew"


def check_aliases(depot: Depot) -> Iterator[Problem]:
    """Whether the logs can be read and mean versions that are here."""
    home = depot.folder / "aliases"
    for path in sorted(home.rglob("*.jsonl")):
        name = path.relative_to(home).with_suffix("").as_posix()
        if not is_name(name):
            continue  # a stray file
        where = below(depot, path)
        try:
            moves = depot.aliases.log(name)
        except (GraftoryError, OSError) as error:
            yield Problem(None, where, cause(error), "remove the damaged line, then hub verify --rebuild")
            continue
        if moves and not path.read_bytes().endswith(b"\n"):
            yield Problem(
                None, where, "lacks the end of its last line", "add it: the next move would be written into it"
            )
        missing = sorted({move.version for move in moves} - set(depot.records.versions(name)))
        if missing:
            yield Problem(None, where, f"an alias means {name}@{missing[0]}, which is not here", PULL)


def check_index(depot: Depot) -> Iterator[Problem]:
    """Whether `registry.json` is what the records and alias logs make; looked at again with writers kept out."""
    if _index_fault(depot, set()) is None:
        return
    with _still(depot):
        changing = pending.read(depot.pending_path)
        if changing is None:
            return  # readers make every row anew, and the next writer mends it
        fault = _index_fault(depot, set(changing))
    if fault is not None:
        yield Problem(None, depot.index_path.name, fault, _REBUILD)


def _index_fault(depot: Depot, excused: set[str]) -> str | None:
    """What is wrong with the index.

    Args:
        depot: The hub.
        excused: Names that a writer noted before it was broken off: readers make their rows anew.
    """
    rows, unknown = [], set(excused)
    for name in depot.records.names():
        try:
            row = index.make_row(depot.records, depot.aliases, name)
        except (GraftoryError, OSError):  # noqa: PERF203 (each name is judged alone)
            unknown.add(name)  # its damaged record or log is a problem of its own
        else:
            rows += [row] if row is not None else []
    try:
        if not unknown:
            right = depot.index_path.read_bytes() == index.index_bytes(tuple(rows))
        else:
            kept = [row for row in index.read_index(depot.index_path) if row.name not in unknown]
            right = kept == [row for row in rows if row.name not in unknown]
    except FileNotFoundError:
        # nothing is missing from a hub that was broken off while it was made, and a note excuses it too
        return "is missing" if rows and not excused else None
    except (GraftoryError, OSError) as error:
        return cause(error)
    return None if right else "is not what the records and alias logs make"


def leftovers(depot: Depot, known: Needs) -> tuple[Removed, ...]:
    """What hub gc would remove; none of it if a record cannot be read, which may need it."""
    try:
        if not clean(depot, read_needs(depot, known), dry_run=True):
            return ()
        with _still(depot):  # some of it may be of writers that were at work
            return clean(depot, read_needs(depot, known), dry_run=True)
    except FileNotFoundError:  # between two looks, by a writer
        with _still(depot):
            return clean(depot, read_needs(depot, known), dry_run=True)
    except CorruptAdapterError:
        return ()


@contextmanager
def _still(depot: Depot) -> Iterator[None]:
    """Keep writers out; on a disk that cannot be written to there are none."""
    with ExitStack() as stack:
        try:
            stack.enter_context(depot.lock())
        except RemoteError:
            raise
        except OSError:
            pass
        yield
