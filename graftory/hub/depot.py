"""One hub on disk: blobs, records and index behind one lock, in the order that survives a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from graftory.adapter import AdapterRef, AdapterSpec
from graftory.errors import AdapterNotFoundError, CorruptAdapterError, RemoteError, VersionConflictError
from graftory.hub import index
from graftory.hub.aliases import AliasMove, AliasStore
from graftory.hub.contents import check_contents, check_file_names
from graftory.hub.files import make_folder, write_atomic
from graftory.hub.records import SCHEMA, FileEntry, Record, RecordStore, TensorEntry, digest_of, file_entries
from graftory.hub.store import BlobStore

LOCK_SECONDS = 300.0
"""How long a writer waits for another one."""
_FOR_GIT = {".gitattributes": b"* -text\n", ".gitignore": b"/lock\n/tmp/\n"}
"""A hub may be committed: its bytes must come back as they were, without what is passing."""


@dataclass(frozen=True, slots=True)
class Depot:
    """The storage of a hub. Readers take no lock; writers go blob, record, index under one.

    Attributes:
        root: Folder of `registry.json` and `.hub/`.
    """

    root: Path

    @property
    def folder(self) -> Path:
        """The `.hub` folder."""
        return self.root / ".hub"

    @property
    def blobs(self) -> BlobStore:
        """The bytes."""
        return BlobStore(self.folder)

    @property
    def records(self) -> RecordStore:
        """The versions."""
        return RecordStore(self.folder)

    @property
    def aliases(self) -> AliasStore:
        """The alias logs."""
        return AliasStore(self.folder)

    @property
    def index_path(self) -> Path:
        """The index file."""
        return self.root / index.FILE_NAME

    def create(self) -> None:
        """Make an empty hub; an existing one stays as it is."""
        make_folder(self.folder / "records")
        with self.lock():
            for name, data in _FOR_GIT.items():
                if not (self.folder / name).exists():
                    write_atomic(self.folder / name, data, self.folder / "tmp")
            if not self.index_path.exists():
                self.rebuild()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other writers out.

        Raises:
            RemoteError: If another writer has held the hub for five minutes.
        """
        from filelock import FileLock, Timeout

        make_folder(self.folder)
        lock = FileLock(str(self.folder / "lock"), timeout=LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout:
            raise RemoteError(f"{self.root}: another writer holds the hub's lock; wait for it or end it") from None
        try:
            yield
        finally:
            lock.release()

    def rows(self) -> tuple[index.IndexRow, ...]:
        """The index; made from the records where `registry.json` was lost."""
        try:
            return index.read_index(self.index_path)
        except FileNotFoundError:
            return index.make_index(self.records, self.aliases)

    def rebuild(self) -> tuple[index.IndexRow, ...]:
        """Make the index anew from records and alias logs; the caller holds the lock."""
        rows = index.make_index(self.records, self.aliases)
        write_atomic(self.index_path, index.index_bytes(rows), self.folder / "tmp")
        return rows

    def refresh(self, name: str) -> None:
        """Bring one row of the index up to date; the caller holds the lock."""
        try:
            rows = index.read_index(self.index_path)
        except (FileNotFoundError, CorruptAdapterError):
            self.rebuild()
            return
        row = index.make_row(self.records, self.aliases, name)
        others = tuple(other for other in rows if other.name != name)
        data = index.index_bytes((*others, row) if row else others)
        if data != self.index_path.read_bytes():
            write_atomic(self.index_path, data, self.folder / "tmp")

    def publish(
        self,
        name: str,
        version: int | None,
        spec: AdapterSpec,
        files: Mapping[str, bytes],
        tensors: tuple[TensorEntry, ...],
    ) -> AdapterRef:
        """Keep an adapter as a version of `name`.

        Args:
            name: Name in the hub.
            version: The version to write; None for the next one, or for the one that holds the
                same digest already.
            spec: Its specification.
            files: Its files.
            tensors: What the files hold.

        Raises:
            VersionConflictError: If `version` exists with another digest. Nothing is changed.
        """
        entries = file_entries(files)
        digest = digest_of(entries, spec)
        with self.lock():
            known = (
                next((r for r in self.records.of_name(name) if r.digest == digest), None) if version is None else None
            )
            number = known.version if known else version or max(self.records.versions(name), default=0) + 1
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            record = Record(SCHEMA, name, number, digest, spec, entries, tensors, now)
            self._commit(record, files.__getitem__, trusted=True)
        return record.ref

    def receive(self, record: Record, fetch: Callable[[str], bytes]) -> AdapterRef:
        """Keep a record that was made elsewhere, under its own version.

        Args:
            record: The record, checked.
            fetch: Gives the bytes of one of its files; asked only for those that are not here yet.

        Raises:
            VersionConflictError: If the version exists with another digest. Nothing is changed.
            CorruptAdapterError: If the files are not what the record says. No record is made.
        """
        check_file_names(record)
        with self.lock():
            self._commit(record, fetch, trusted=False)
        return record.ref

    def _commit(self, record: Record, fetch: Callable[[str], bytes], trusted: bool) -> None:
        if record.version in self.records.versions(record.name):
            self._check_same(record)
        else:
            files = {entry.path: self._keep(entry, fetch) for entry in record.files}
            if not trusted:
                check_contents(record, files)
            try:
                self.records.create(record)
            except FileExistsError:
                self._check_same(record)
        self.refresh(record.name)

    def _keep(self, entry: FileEntry, fetch: Callable[[str], bytes]) -> bytes:
        if self.blobs.has(entry.sha256):
            return self.blobs.read(entry.sha256, entry.path)
        data = fetch(entry.path)
        self.blobs.write(data)
        return data

    def _check_same(self, record: Record) -> None:
        there = self.records.read(record.name, record.version)
        if there.digest != record.digest:
            raise VersionConflictError(
                f"{record.ref} exists in {self.root} as {there.digest[:19]}…, this is {record.digest[:19]}…; "
                "a version never changes: use another version or name"
            )

    def move_alias(self, name: str, alias: str, version: int) -> None:
        """Let `alias` mean `version` from now on; a no-op if it does.

        Raises:
            AdapterNotFoundError: If there is no such version.
        """
        AdapterRef(name, alias=alias)
        with self.lock():
            if version not in self.records.versions(name):
                raise AdapterNotFoundError(
                    f"{name}@{version} is not in {self.root}; an alias needs an existing version"
                )
            if self.aliases.current(name).get(alias) != version:
                now = datetime.now(timezone.utc).isoformat(timespec="seconds")
                self.aliases.append(name, AliasMove(alias, version, now))
            self.refresh(name)
