"""Taking in an adapter that has no record: a repository as PEFT's users upload it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from graftory.adapter import AdapterRef, AdapterSpec
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from graftory.hub import strict_json
from graftory.hub.codecs import codec_of, codec_of_files
from graftory.hub.codecs.peft import CONFIG, WEIGHTS, outlined_spec
from graftory.hub.codecs.tensors import check_finite
from graftory.hub.depot import Depot
from graftory.hub.files import map_file
from graftory.hub.records import FileEntry, Record, TensorEntry, file_entries
from graftory.hub.remotes.base import Foreign, Remote
from graftory.hub.safetensors_header import header_bytes, parse_header
from graftory.progress import Progress

SOURCE = "source"
"""Key in `Lineage.parameters`: where an adapter without a record was found."""


def take_in(
    depot: Depot, remote: Remote, item: Foreign, *, name: str | None, allow_nonfinite: bool, progress: Progress
) -> AdapterRef:
    """Fetch an adapter without a record and make one, as the next version of a name, or as the version that
    holds the same already. What the files do not tell stays open in it.

    Raises:
        CorruptAdapterError: If the bytes are not those that the remote promised, or break their format.
        UnsupportedAdapterError: If it uses something graftory does not do.
    """

    def fetch(entry: FileEntry, target: Path) -> None:
        remote.fetch(item, entry, target, lambda done: progress(entry.path, done, entry.size))

    with depot.staging.hold(entry.sha256 for entry in item.files):
        staged = depot.stage(item.files, fetch)
        try:
            paths = {entry.path: staged.get(entry.sha256, depot.blobs.path(entry.sha256)) for entry in item.files}
            files = {path: bytes(map_file(where)) for path, where in paths.items()}
            if file_entries(files) != item.files:
                raise CorruptAdapterError(f"{item.source}: the bytes are not those that were promised; pull it again")
            spec = spec_of(item, files, name or item.name)
            tensors = codec_of(spec).check(files, spec)
            if not allow_nonfinite:
                check_finite(files)
            return depot.publish(name or item.name, None, spec, files, tensors)
        finally:
            depot.staging.discard(staged)


def spec_of(item: Foreign, files: Mapping[str, bytes], name: str) -> AdapterSpec:
    """What the files tell, with where they were found and their licence."""
    spec = codec_of_files(files).imported_spec(files, name)
    lineage = replace(spec.lineage, parameters={**spec.lineage.parameters, SOURCE: item.source})
    return replace(spec, lineage=lineage, licence=item.licence)


def outline(remote: Remote, item: Record | Foreign) -> tuple[AdapterSpec, tuple[TensorEntry, ...]]:
    """What an adapter is and the shapes of its tensors, before its weights are fetched.

    Raises:
        CorruptAdapterError: If its configuration or the header of its weights breaks the format.
        UnsupportedAdapterError: If it uses something graftory does not do.
    """
    if isinstance(item, Record):
        return item.spec, item.tensors
    entries = {entry.path: entry for entry in item.files}
    if CONFIG not in entries or WEIGHTS not in entries:
        raise UnsupportedAdapterError(f"{item.source}: wanted PEFT's {CONFIG} and {WEIGHTS}; got {', '.join(entries)}")
    config, weights = entries[CONFIG], entries[WEIGHTS]
    length = header_bytes(remote.peek(item, weights, 8), WEIGHTS)
    stored = parse_header(remote.peek(item, weights, length), weights.size, WEIGHTS)
    return outlined_spec(remote.peek(item, config, min(config.size, strict_json.SMALL + 1)), stored, item.name)
