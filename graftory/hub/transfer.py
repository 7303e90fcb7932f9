"""Moving a version from one hub to another: the parents a composition needs first, then files, then record."""

from __future__ import annotations

from collections.abc import Callable

from graftory.errors import AdapterNotFoundError
from graftory.hub.contents import check_file_names
from graftory.hub.records import Record
from graftory.hub.remotes import Remote

Progress = Callable[[str, int, int], None]
"""Called with what travels, the bytes done and the bytes in all."""


def transfer(source: Remote, target: Remote, record: Record, progress: Progress | None = None) -> None:
    """Bring a version and the parents it is composed of to another hub; every version keeps its number.

    Args:
        source: Where it is.
        target: Where it shall be.
        record: The version.
        progress: Told of every file that travels, and of the end.

    Raises:
        AdapterNotFoundError: If a parent is in neither hub.
        CorruptAdapterError: If bytes are not the recorded ones, or not what the record says.
        VersionConflictError: If the target has the version with other bytes.
    """
    check_file_names(record)
    for parent in record.spec.lineage.parents:
        name = parent.ref.partition("@")[0]
        if parent.relation == "composed" and target.find(parent.digest, name) is None:
            found = source.find(parent.digest, name)
            if found is None:
                raise AdapterNotFoundError(
                    f"{record.ref} is composed of {parent.ref}, which is missing; bring it first"
                )
            transfer(source, target, found, progress)
    done = 0

    def fetch(path: str) -> bytes:
        nonlocal done
        data = source.read(record, path)
        done += len(data)
        if progress is not None:
            progress(f"{record.ref} {path}", done, record.size)
        return data

    target.receive(record, fetch)
    if progress is not None:
        progress(f"{record.ref}", record.size, record.size)
