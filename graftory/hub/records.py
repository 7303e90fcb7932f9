"""Records: what a version is. `records/<name>/<version>.json`, written once and never changed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any

from graftory.adapter import MAX_VERSION, AdapterRef, AdapterSpec, check_name, spec_from_json, spec_to_json
from graftory.errors import ConfigError, CorruptAdapterError, InvalidNameError
from graftory.hub import strict_json
from graftory.hub.files import create_exclusive
from graftory.hub.safetensors_header import Bytes
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
        source: The bytes of its file. They travel as they are: a graftory that knows more fields
            must not change what an older one wrote, nor what was signed.
    """

    schema: int
    name: str
    version: int
    digest: str
    spec: AdapterSpec
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    created: str
    source: bytes = field(default=b"", compare=False, repr=False)

    @classmethod
    def new(
        cls,
        name: str,
        version: int,
        spec: AdapterSpec,
        files: tuple[FileEntry, ...],
        tensors: tuple[TensorEntry, ...],
    ) -> Record:
        """A record made now.

        Raises:
            ConfigError: If the specification holds what JSON cannot, such as NaN.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = cls(SCHEMA, name, version, digest_of(files, spec), spec, files, tensors, now)
        return replace(record, source=pretty(record_to_json(record)))

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
        return _digest(encode(files), spec_to_json(spec))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the specification cannot be written as JSON ({error}); use finite numbers and text"
        ) from None


def _digest(files: Json, spec: Json) -> str:
    return f"sha256:{hashlib.sha256(canonical({'files': files, 'spec': spec})).hexdigest()}"


def file_entries(files: Mapping[str, Bytes]) -> tuple[FileEntry, ...]:
    """The entries of files given as bytes, ordered by path."""
    return tuple(FileEntry(path, hashlib.sha256(files[path]).hexdigest(), len(files[path])) for path in sorted(files))


def record_to_json(record: Record) -> Json:
    """The record as plain JSON values, in the order of its file."""
    return {
        "schema": record.schema,
        "name": record.name,
        "version": record.version,
        "digest": record.digest,
        "spec": spec_to_json(record.spec),
        "files": encode(record.files),
        "tensors": encode(record.tensors),
        "created": record.created,
    }


def record_from_bytes(data: bytes, where: str) -> Record:
    """Read a record and check that its digest is its own.

    Raises:
        CorruptAdapterError: If it is not a record of this format, or was changed after it was written.
    """
    fields = strict_json.loads(data, where, limit=strict_json.LARGE)
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
        raise CorruptAdapterError(f"{where}: not a record of schema {SCHEMA}; a newer graftory may read it")
    # over the values as they stand: fields that came later must not change the digest of an older record
    digest = _digest(fields.get("files"), fields.get("spec"))
    try:
        spec = spec_from_json(fields.pop("spec", None), f"{where}: spec")
        values: dict[str, Any] = {
            name: decode(kind, fields.pop(name, None), f"{where}: {name}") for name, kind in _FIELDS.items()
        }
        check_name(values["name"])
    except (ConfigError, InvalidNameError) as error:
        raise CorruptAdapterError(f"{error}; the record is damaged, pull it again from another hub") from None
    record = Record(spec=spec, **values, source=data)
    if fields or not 1 <= record.version <= MAX_VERSION or digest != record.digest:
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
        parts = _folders(top)
        names = [*parts, *(f"{part}/{inner}" for part in parts for inner in _folders(top / part))]
        return tuple(sorted(name for name in names if is_name(name) and _has_version(top / name)))

    def versions(self, name: str) -> tuple[int, ...]:
        """The versions of a name, ascending; empty if there is none."""
        try:
            found = [_version(path) for path in self._home(name).iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return ()
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
        create_exclusive(self.path(record.name, record.version), record.source, self.folder / "tmp")

    def of_name(self, name: str) -> Iterator[Record]:
        """The records of one name, newest first."""
        for version in reversed(self.versions(name)):
            yield self.read(name, version)

    def find(self, digest: str, hint: str | None = None) -> Record | None:
        """The record with a digest, wherever it is; `hint` is a name to look at first."""
        first = [hint] if hint is not None and is_name(hint) else []
        found = (self.find_version(name, digest) for name in chain(first, self._names_but(first)))
        return next((record for record in found if record is not None), None)

    def _names_but(self, known: list[str]) -> Iterator[str]:
        yield from (name for name in self.names() if name not in known)

    def find_version(self, name: str, digest: str) -> Record | None:
        """The newest record of a name with a digest; only records that mention it are parsed."""
        mention = digest.encode()
        for version in reversed(self.versions(name)):
            if mention in self.path(name, version).read_bytes():
                record = self.read(name, version)
                if record.digest == digest:
                    return record
        return None

    def _home(self, name: str) -> Path:
        return self.folder / "records" / check_stored_name(name)


def check_stored_name(name: str) -> str:
    """Return `name` if it may name an adapter in a hub.

    Raises:
        InvalidNameError: If it is no name, or a part of it ends like a file of the hub.
    """
    if any(part.endswith((".json", ".jsonl")) for part in check_name(name).split("/")):
        raise InvalidNameError(f"{name!r}: a part ends like a file of the hub; drop the .json")
    return name


def is_name(name: str) -> bool:
    """Whether `name` may name an adapter in a hub."""
    try:
        check_stored_name(name)
    except InvalidNameError:
        return False
    return True


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):  # gc removes a folder once it is empty
        return []


def _has_version(home: Path) -> bool:
    try:
        with os.scandir(home) as entries:
            return any(_VERSION_FILE.fullmatch(entry.name) and entry.is_file() for entry in entries)
    except FileNotFoundError:  # gc removes a folder once it is empty
        return False


def _version(path: Path) -> int | None:
    match = _VERSION_FILE.fullmatch(path.name)
    return int(match[1]) if match and path.is_file() else None
