"""One hub on disk: blobs, records and index behind one lock, in the order that survives a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from graftory.adapter import AdapterRef, AdapterSpec
from graftory.errors import (
    AdapterNotFoundError,
    GraftoryError,
    RemoteError,
    StorageError,
    VersionConflictError,
)
from graftory.hub import index, pending
from graftory.hub.aliases import AliasMove, AliasStore
from graftory.hub.contents import check_contents, check_file_names
from graftory.hub.files import KEPT, disk, make_folder, map_file, sync_file, write_atomic
from graftory.hub.records import FileEntry, Record, RecordStore, TensorEntry, digest_of, file_entries
from graftory.hub.signature_store import SignatureStore
from graftory.hub.staging import Staging
from graftory.hub.store import BlobStore

Fetch = Callable[[FileEntry, Path], None]
"""Makes a path hold the bytes of a file; what an earlier, broken try left there may be continued."""

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
    def signatures(self) -> SignatureStore:
        """The signatures."""
        return SignatureStore(self.folder)

    @property
    def staging(self) -> Staging:
        """The unfinished downloads."""
        return Staging(self.folder)

    @property
    def tmp(self) -> Path:
        """The folder of what is passing."""
        return self.folder / "tmp"

    @property
    def pending_path(self) -> Path:
        """The names whose rows a writer is changing, or was when it was broken off."""
        return self.folder / "pending"

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
                    write_atomic(self.folder / name, data, self.tmp)
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
        """The index; made from the records where `registry.json` was lost, and up to date at every
        moment: rows that a writer is changing are made anew."""
        names = pending.read(self.pending_path)
        if names is None:
            return index.make_index(self.records, self.aliases)
        try:
            rows = index.read_index(self.index_path)
        except FileNotFoundError:
            return index.make_index(self.records, self.aliases)
        return self._with_rows_of(rows, names) if names else rows

    def rebuild(self) -> tuple[index.IndexRow, ...]:
        """Make the index anew from records and alias logs; the caller holds the lock."""
        rows = index.make_index(self.records, self.aliases)
        write_atomic(self.index_path, index.index_bytes(rows), self.tmp)
        pending.clear(self.pending_path)
        return rows

    def repair(self) -> None:
        """Make up for a writer that was broken off before its row was in the index; the caller holds the lock."""
        names = pending.read(self.pending_path)
        if names is None or not self.index_path.is_file():
            self.rebuild()
        elif names:
            self._refresh(names)

    def add_signature(self, record: Record, key_id: str, data: bytes) -> bool:
        """Keep a signature; one of the same key that is there stays, and False is returned.

        Raises:
            SignatureError: If the id of the key or the size of the signature is impossible.
        """
        with self.lock():
            return self.signatures.add(record.name, record.version, key_id, data)

    @contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """Change records or aliases of a name; the caller holds the lock. Whatever happens within, and
        wherever it is broken off, readers see rows that agree with the records."""
        names = pending.read(self.pending_path)
        wanted = (name,) if names is None else tuple(sorted({*names, name}))
        pending.write(self.pending_path, wanted, self.tmp)
        try:
            yield
        finally:
            with suppress(StorageError):  # a full disk: the note stays, readers and the next writer make up for it
                if names is None:
                    self.rebuild()
                else:
                    self._refresh(wanted)

    def _catch_up(self, name: str) -> None:
        """Make the row of a name anew, and those that a writer noted before it was broken off."""
        names = pending.read(self.pending_path)
        if names is None:
            self.rebuild()
        else:
            self._refresh(tuple(sorted({*names, name})))

    def _refresh(self, names: tuple[str, ...]) -> None:
        before = self.index_path.read_bytes() if self.index_path.is_file() else b""
        data: bytes | None = before
        for name in names:
            data = data and index.with_row(data, name, index.make_row(self.records, self.aliases, name))
        if not data:
            self.rebuild()
            return
        if data != before:
            write_atomic(self.index_path, data, self.tmp)
        pending.clear(self.pending_path)

    def _with_rows_of(self, rows: tuple[index.IndexRow, ...], names: tuple[str, ...]) -> tuple[index.IndexRow, ...]:
        fresh = (index.make_row(self.records, self.aliases, name) for name in names)
        kept = (row for row in rows if row.name not in names)
        return tuple(sorted((*kept, *(row for row in fresh if row is not None)), key=lambda row: row.name))

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
            StorageError: If the disk is full. Nothing is changed.
        """
        entries = file_entries(files)
        digest = digest_of(entries, spec)
        with self.lock():
            known = self.records.find_version(name, digest) if version is None else None
            if known is not None:
                version = known.version
            number = version or max(self.records.versions(name), default=0) + 1
            record = Record.new(name, number, spec, entries, tensors)
            self.holds(record)
            for data in files.values():
                self.blobs.write(data)
            self._commit(record)
        return record.ref

    def receive(self, record: Record, fetch: Fetch, *, allow_nonfinite: bool = False) -> AdapterRef:
        """Keep a record that was made elsewhere, under its own version.

        Files are put together beside the hub, without its lock; a broken transfer is continued by the
        next one. Only when all of them are here and checked, the lock is taken and they become visible.

        Args:
            record: The record, checked.
            fetch: Asked for those files only that are not here yet, or damaged.
            allow_nonfinite: Whether weights may be NaN or infinite.

        Raises:
            VersionConflictError: If the version exists with another digest. Nothing is changed.
            CorruptAdapterError: If the files are not what the record says. No record is made.
            StorageError: If the disk is full. Nothing is changed.
        """
        check_file_names(record)
        while not self._receive(record, fetch, allow_nonfinite):
            pass  # something that was here vanished or was no good: it is fetched from the beginning
        return record.ref

    def _receive(self, record: Record, fetch: Fetch, allow_nonfinite: bool) -> bool:
        if self.holds(record) and all(self.blobs.is_intact(entry.sha256) for entry in record.files):
            with self.lock():
                self._catch_up(record.name)
            return True
        with self.staging.hold(entry.sha256 for entry in record.files):
            begun = any(self.staging.path(entry.sha256).exists() for entry in record.files)
            staged = self.stage(record.files, fetch)
            try:
                contents = {e.path: map_file(staged.get(e.sha256, self.blobs.path(e.sha256))) for e in record.files}
            except FileNotFoundError:  # a blob that no record names yet, and gc came between
                return False
            try:
                with ThreadPoolExecutor(1) as pool:  # the disk writes while the processor hashes
                    synced = [pool.submit(sync_file, path) for path in staged.values()]
                    check_contents(record, contents, allow_nonfinite=allow_nonfinite)
                for sync in synced:
                    sync.result()
            except GraftoryError:
                self.staging.discard(staged)
                if begun:  # what an earlier try left may have been damaged since, say by a power cut
                    return False
                raise
            with self.lock():
                if not all(entry.sha256 in staged or self.blobs.has(entry.sha256) for entry in record.files):
                    return False
                for sha256, path in staged.items():
                    self.blobs.adopt(path, sha256)
                self._commit(record)
        return True

    def stage(self, entries: tuple[FileEntry, ...], fetch: Fetch) -> dict[str, Path]:
        """Fetch the files that are not blobs yet, or damaged ones; the caller holds them in `staging`.

        Returns:
            Where each of them lies, by the hash that it should have; the caller hashes them.
        """
        staged = {}
        for entry in entries:
            if self.blobs.is_intact(entry.sha256) or entry.sha256 in staged:
                continue
            path = self.staging.path(entry.sha256)
            with disk(path, KEPT):
                fetch(entry, path)
            staged[entry.sha256] = path
        return staged

    def holds(self, record: Record) -> bool:
        """Whether the version is here already.

        Raises:
            VersionConflictError: If it is, with another digest.
        """
        if record.version not in self.records.versions(record.name):
            return False
        there = self.records.read(record.name, record.version)
        if there.digest != record.digest:
            raise VersionConflictError(
                f"{record.ref} exists in {self.root} as {there.digest[:19]}…, this is {record.digest[:19]}…; "
                "a version never changes: use another version or name"
            )
        return True

    def _commit(self, record: Record) -> None:
        if self.holds(record):
            self._catch_up(record.name)
            return
        with self.changing(record.name):
            try:
                self.records.create(record)
            except FileExistsError:  # by a writer that the lock does not keep out, as on some network disks
                self.holds(record)

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
                with self.changing(name):
                    self.aliases.append(name, AliasMove(alias, version, now))
