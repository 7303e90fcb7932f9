"""`registry.json`: one row for each name, a deterministic function of the records and alias logs.

It is JSON with a row on each line, so that a push changes one line of it, also in a `git diff`, and need
not parse the others.
"""

from __future__ import annotations

import json
import re
from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graftory.adapter import AdapterRef
from graftory.errors import ConfigError, CorruptAdapterError, InvalidNameError
from graftory.hub import strict_json
from graftory.hub.aliases import AliasStore
from graftory.hub.records import RecordStore
from graftory.schema import decode, encode

FORMAT = "graftory-registry"
SCHEMA = 1
FILE_NAME = "registry.json"
_HEAD = f'{{"format": "{FORMAT}", "schema": {SCHEMA}, "adapters": [\n'.encode()
_TAIL = b"]}\n"
_START = b'{"name": "%s",'
_ROW = re.compile(rb'\{"name": "[^"\\\n]+", [^\n]*\}')


@dataclass(frozen=True, slots=True)
class IndexRow:
    """What listing shows of a name.

    Attributes:
        name: Name in the hub.
        version: Newest version.
        digest: Digest of the newest version.
        aliases: What each alias means.
        task: Name of the newest version's task, if known.
        kind: Kind of that task.
        method: Adapter method of the newest version.
        base: Id of its base model.
    """

    name: str
    version: int
    digest: str
    aliases: Mapping[str, int]
    task: str | None
    kind: str | None
    method: str
    base: str


def make_row(records: RecordStore, aliases: AliasStore, name: str) -> IndexRow | None:
    """The row of one name, from its newest record and alias log; None if it has no version."""
    newest = next(records.of_name(name), None)
    if newest is None:
        return None
    spec = newest.spec
    return IndexRow(
        name=name,
        version=newest.version,
        digest=newest.digest,
        aliases=aliases.current(name),
        task=spec.task.name if spec.task else None,
        kind=spec.task.kind if spec.task else None,
        method=spec.method,
        base=spec.base.id,
    )


def make_index(records: RecordStore, aliases: AliasStore) -> tuple[IndexRow, ...]:
    """Every row, made anew from the records and alias logs."""
    rows = (make_row(records, aliases, name) for name in records.names())
    return tuple(row for row in rows if row is not None)


def index_bytes(rows: tuple[IndexRow, ...]) -> bytes:
    """The one byte string of an index: rows sorted by name."""
    return _joined([_line(row) for row in sorted(rows, key=lambda row: row.name)])


def with_row(data: bytes, name: str, row: IndexRow | None) -> bytes | None:
    """The bytes of an index with the row of one name put in, replaced or taken out.

    Returns:
        The same bytes as `index_bytes` gives; None if `data` is not of its form, say after an edit by hand.
    """
    if not data.startswith(_HEAD) or not data.endswith(_TAIL):
        return None
    body = data[len(_HEAD) : -len(_TAIL)]
    lines = body.removesuffix(b"\n").split(b",\n") if body else []
    if not all(_ROW.fullmatch(line) for line in lines):
        return None
    start = _START % name.encode()
    lines = [line for line in lines if not line.startswith(start)]
    if row is not None:
        insort(lines, _line(row), key=_name)
    return _joined(lines)


def _line(row: IndexRow) -> bytes:
    return json.dumps(encode(row), ensure_ascii=False, allow_nan=False).encode()


def _joined(lines: list[bytes]) -> bytes:
    return _HEAD + b",\n".join(lines) + (b"\n" if lines else b"") + _TAIL


def _name(line: bytes) -> bytes:
    return line[len(_START) - 4 : line.index(b'"', len(_START) - 4)]


def read_index(path: Path) -> tuple[IndexRow, ...]:
    """The rows of a `registry.json`.

    Raises:
        FileNotFoundError: If it is not there.
        CorruptAdapterError: If it is damaged.
    """
    data = strict_json.loads(path.read_bytes(), str(path), limit=strict_json.LARGE)
    if not isinstance(data, dict) or (data.get("format"), repr(data.get("schema"))) != (FORMAT, str(SCHEMA)):
        raise CorruptAdapterError(f"{path}: not an index of this format; make it anew with hub verify --rebuild")
    try:
        rows: tuple[IndexRow, ...] = decode(tuple[IndexRow, ...], data.get("adapters"), str(path))
        for row in rows:
            _check(row)
    except ConfigError as error:
        raise CorruptAdapterError(f"{error}; make the index anew with hub verify --rebuild") from None
    except InvalidNameError as error:
        raise CorruptAdapterError(f"{path}: {error}; make the index anew with hub verify --rebuild") from None
    return rows


def _check(row: IndexRow) -> None:
    """Check that a row is of a name and versions that a hub can have.

    Raises:
        InvalidNameError: If it is not.
    """
    AdapterRef(row.name, version=row.version)
    AdapterRef(row.name, digest=row.digest)
    for alias, version in row.aliases.items():
        AdapterRef(row.name, alias=alias)
        AdapterRef(row.name, version=version)
