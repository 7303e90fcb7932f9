"""Records: what a version is. `records/<name>/<version>.json`, written once and never changed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftory.adapter import AdapterRef, AdapterSpec, check_name, spec_from_json, spec_to_json
from graftory.errors import ConfigError, CorruptAdapterError, InvalidNameError
from graftory.hub import strict_json
from graftory.hub.files import create_exclusive
from graftory.schema import Json, canonical, decode, encode, pretty

SCHEMA = 1
_VERSION_FILE = re.compile(r"([1-9][0-9]{0,8})\.json")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an adapter."""

    path: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of an adapter, under the name it has in `Adapter.tensors`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Record:
    """One version of an adapter: everything but the bytes.

    Attributes:
        schema: Version of this format.
        name: Name in the hub.
        version: 1, 2, ...
        digest: `sha256:` over the canonical JSON of `{files, spec}`; independent of name, version and time.
        spec: The specification.
        files: The files, ordered by path.
        tensors: The tensors, ordered by name.
        created: When the record was first written, ISO 8601 in UTC.
    """

    schema: int
    name: str
    version: int
    digest: str
    spec: AdapterSpec
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    created: str

    @property
    def ref(self) -> AdapterRef:
        """`name@version`."""
        return AdapterRef(self.name, version=self.version)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)


def digest_of(files: tuple[FileEntry, ...], spec: AdapterSpec) -> str:
    """The digest of an adapter: sha256 over the canonical JSON of its files and specification.

    Raises:
        ConfigError: If the specification holds what JSON cannot, such as NaN.
    """
    try:
        text = canonical({"files": encode(files), "spec": spec_to_json(spec)})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the specification cannot be written as JSON ({error}); use finite numbers and text"
        ) from None
    return f"sha256:{hashlib.sha256(text).hexdigest()}"


def file_entries(files: Mapping[str, bytes]) -> tuple[FileEntry, ...]:
    """The entries of files given as bytes, ordered by path."""
    return tuple(FileEntry(path, hashlib.sha256(files[path]).hexdigest(), len(files[path])) for path in sorted(files))


def record_to_json(record: Record) -> Json:
    """The record as plain JSON values."""
    return {**encode(record), "spec": spec_to_json(record.spec)}


def record_from_bytes(data: bytes, where: str) -> Record:
    """Read a record and check that its digest is its own.

    Raises:
        CorruptAdapterError: If it is not a record of this format, or was changed after it was written.
    """
    fields = strict_json.loads(data, where, limit=strict_json.LARGE)
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
        raise CorruptAdapterError(f"{where}: not a record of schema {SCHEMA}; a newer graftory may read it")
    try:
        spec = spec_from_json(fields.pop("spec", None), f"{where}: spec")
        values: dict[str, Any] = {
            name: decode(kind, fields.pop(name, None), f"{where}: {name}") for name, kind in _FIELDS.items()
        }
        check_name(values["name"])
    except (ConfigError, InvalidNameError) as error:
        raise CorruptAdapterError(f"{error}; the record is damaged, pull it again from another hub") from None
    record = Record(spec=spec, **values)
    if fields or record.version < 1 or digest_of(record.files, spec) != record.digest:
        raise CorruptAdapterError(f"{where}: the record is not what its digest says; pull it again from another hub")
    return record


_FIELDS = {
    "schema": int,
    "name": str,
    "version": int,
    "digest": str,
    "files": tuple[FileEntry, ...],
    "tensors": tuple[TensorEntry, ...],
    "created": str,
}


@dataclass(frozen=True, slots=True)
class RecordStore:
    """The records of one hub; they are the truth that `registry.json` is derived from.

    Attributes:
        folder: The hub's `.hub` folder.
    """

    folder: Path

    def path(self, name: str, version: int) -> Path:
        """Where a record lies, or would lie."""
        return self._home(name) / f"{version}.json"

    def names(self) -> tuple[str, ...]:
        """Every name that has a version, sorted."""
        top = self.folder / "records"
        found = {path.parent.relative_to(top).as_posix() for path in top.rglob("*.json") if _version(path)}
        return tuple(sorted(found))

    def versions(self, name: str) -> tuple[int, ...]:
        """The versions of a name, ascending; empty if there is none."""
        home = self._home(name)
        found = (_version(path) for path in home.iterdir()) if home.is_dir() else iter(())
        return tuple(sorted(version for version in found if version))

    def read(self, name: str, version: int) -> Record:
        """One record.

        Raises:
            FileNotFoundError: If there is no such version.
            CorruptAdapterError: If the file is damaged or belongs elsewhere.
        """
        path = self.path(name, version)
        record = record_from_bytes(path.read_bytes(), str(path))
        if (record.name, record.version) != (name, version):
            raise CorruptAdapterError(f"{path}: holds {record.ref}; a record was moved by hand, put it back")
        return record

    def create(self, record: Record) -> None:
        """Write a new record, durable when this returns.

        Raises:
            FileExistsError: If the version exists; of two writers exactly one gets through.
        """
        data = pretty(record_to_json(record))
        create_exclusive(self.path(record.name, record.version), data, self.folder / "tmp")

    def of_name(self, name: str) -> Iterator[Record]:
        """The records of one name, newest first."""
        for version in reversed(self.versions(name)):
            yield self.read(name, version)

    def find(self, digest: str, hint: str | None = None) -> Record | None:
        """The record with a digest, wherever it is; `hint` is a name to look at first."""
        for name in sorted(self.names(), key=lambda name: name != hint):
            for record in self.of_name(name):
                if record.digest == digest:
                    return record
        return None

    def _home(self, name: str) -> Path:
        for part in check_name(name).split("/"):
            if part.endswith((".json", ".jsonl")):
                raise InvalidNameError(f"{name!r}: a part ends like a file of the hub; drop the .json")
        return self.folder / "records" / name


def _version(path: Path) -> int | None:
    match = _VERSION_FILE.fullmatch(path.name)
    return int(match[1]) if match and path.is_file() else None
