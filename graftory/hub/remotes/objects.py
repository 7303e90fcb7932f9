"""A hub in an object store: `s3://bucket/prefix`, and `gs://`, `az://`, `memory://`, through fsspec.

Laid out like a hub's folder. There is no lock and no index: a version is there when its record is,
the store itself decides who creates that, and what is there is found by listing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from graftory.adapter import AdapterRef
from graftory.errors import AdapterNotFoundError, CorruptAdapterError, RemoteError, VersionConflictError
from graftory.hub import strict_json
from graftory.hub.files import sha256_of
from graftory.hub.records import FileEntry, Record, check_stored_name, is_name, record_from_bytes
from graftory.hub.remotes import objects_aliases
from graftory.hub.remotes.base import Blobs, Foreign
from graftory.hub.remotes.objects_store import PART, Bucket, ConditionUnknownError
from graftory.hub.signature_store import MAX_BYTES
from graftory.progress import Progress
from graftory.schema import pretty

MARKER = "graftory-hub.json"
"""The object that makes a prefix a hub."""
SCHEMA = 1
SINGLE_WRITER = "GRAFTORY_SINGLE_WRITER"
"""Set to 1, it allows pushes to a store that cannot keep two writers apart."""
_MARK = {"format": "graftory-objects", "schema": SCHEMA}
_RECORD = re.compile(r"(?P<name>.+)/(?P<version>[1-9][0-9]{0,8})\.json")
_SIGNATURE = re.compile(r"(?P<key>[0-9a-f]{16,64})\.json")
_LIMIT = strict_json.LARGE + 1
"""Bytes of a record that are looked at; one that is longer is refused."""


class ObjectRemote:
    """A hub in an object store."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._known = False
        self._writable = False

    @property
    def address(self) -> str:
        """See `Remote`."""
        return self._bucket.address

    def is_hub(self) -> bool:
        """Whether there is a hub.

        Raises:
            RemoteError: If it is one of a newer format.
        """
        if self._known:
            return True
        data = self._bucket.read(MARKER, strict_json.SMALL)
        if data is None:
            return False
        where = f"{self.address}/{MARKER}"
        if strict_json.loads(data, where) != _MARK:
            raise RemoteError(f"{where}: not a hub of schema {SCHEMA}; a newer graftory may know it")
        self._known = True
        return True

    def listing(self) -> Mapping[str, tuple[int, ...]]:
        """See `Remote`."""
        self._check()
        found: dict[str, list[int]] = {}
        for match in map(_RECORD.fullmatch, self._bucket.keys("records")):
            if match and is_name(match["name"]):
                found.setdefault(match["name"], []).append(int(match["version"]))
        return {name: tuple(sorted(found[name])) for name in sorted(found)}

    def record(self, ref: str) -> Record:
        """See `Remote`."""
        self._check()
        wanted = AdapterRef.parse(ref)
        if wanted.digest is not None:
            record = self._of_name(wanted.name, wanted.digest)
        else:
            version = self._version(wanted)
            record = self._read(wanted.name, version) if version else None
        if record is None:
            raise AdapterNotFoundError(f"no {wanted} in {self.address}; {self._hint(wanted.name)}")
        return record

    def find(self, digest: str, hint: str) -> Record | None:
        """See `Remote`."""
        self._check()
        first = [hint] if is_name(hint) else []
        found = (self._of_name(name, digest) for name in chain(first, self._names_but(hint)))
        return next((record for record in found if record is not None), None)

    def peek(self, item: Record | Foreign, entry: FileEntry, length: int) -> bytes:  # noqa: ARG002 (the interface's)
        """See `Remote`."""
        return self._part(entry, 0, min(length, entry.size))

    def fetch(self, item: Record | Foreign, entry: FileEntry, target: Path, progress: Callable[[int], None]) -> None:  # noqa: ARG002 (the interface's)
        """See `Remote`."""
        with target.open("ab") as writer:
            if writer.tell() > entry.size:
                writer.truncate(0)
            while (done := writer.tell()) < entry.size:
                writer.write(self._part(entry, done, min(PART, entry.size - done)))
                writer.flush()  # a beginning that is on disk need not travel again
                progress(writer.tell())

    def send(self, records: Sequence[Record], blobs: Blobs, progress: Progress) -> None:
        """See `Remote`."""
        self._create()
        for record in records:
            there = self._holds(record)
            if not there:
                self._check_writable()
            for entry in record.files:
                self._keep(record, entry, blobs, progress)
            if not there:
                self._commit(record)

    def aliases(self, name: str) -> Mapping[str, int]:
        """See `Remote`."""
        self._check()
        return objects_aliases.current(self._bucket, name)

    def move_alias(self, name: str, alias: str, version: int) -> None:
        """See `Remote`."""
        self._check()
        AdapterRef(name, alias=alias)
        if self._read(name, version) is None:
            raise AdapterNotFoundError(f"{name}@{version} is not in {self.address}; push it before its alias")
        self._check_writable()
        objects_aliases.move(self._bucket, name, alias, version)

    def signatures(self, record: Record) -> Mapping[str, bytes]:
        """See `Remote`."""
        self._check()
        home = _signatures(record)
        keys = {
            f"{home}/{key}": match["key"] for key in self._bucket.keys(home) if (match := _SIGNATURE.fullmatch(key))
        }
        found = self._bucket.read_many(sorted(keys), MAX_BYTES + 1)
        return {keys[key]: data if len(data) <= MAX_BYTES else b"" for key, data in found}

    def add_signatures(self, record: Record, signatures: Mapping[str, bytes]) -> None:
        """See `Remote`."""
        self._check()
        there = self.signatures(record)
        for key_id in sorted(signatures.keys() - there.keys()):
            self._check_writable()
            self._bucket.create(f"{_signatures(record)}/{key_id}.json", signatures[key_id])

    def _check(self) -> None:
        if not self.is_hub():
            raise RemoteError(f"{self.address}: no hub there (no {MARKER}); check the address, or push to it first")

    def _create(self) -> None:
        """Make a hub of an empty prefix; an existing one stays as it is."""
        if self.is_hub():
            return
        count = 1
        while (outer := self._bucket.below(count)) is not None:
            if ObjectRemote(outer[0]).is_hub():
                raise RemoteError(f"{self.address}: lies inside the hub {outer[0].address}; push to that one")
            count += 1
        if not self._bucket.is_empty() and not self.is_hub():  # another first push may have come between
            raise RemoteError(f"{self.address}: holds other things than a hub; give an empty prefix or a new one")
        self._check_writable()
        self._known = True

    def _check_writable(self) -> None:
        """Try out, once, that of two creations of one object the second is refused. The object is the marker,
        with the bytes that it has or gets anyway, so no right to delete is needed."""
        if self._writable:
            return
        try:
            if not self._known:
                self._bucket.create(MARKER, pretty(_MARK))
            kept = not self._bucket.create(MARKER, pretty(_MARK))
        except ConditionUnknownError:
            kept = False
        if not kept:
            if os.environ.get(SINGLE_WRITER) != "1":
                raise RemoteError(
                    f"{self.address}: the server overwrites an object that may only be created (If-None-Match is "
                    "ignored), so it cannot keep two writers apart; use a store that honours it, or set "
                    f"{SINGLE_WRITER}=1 if nobody else ever pushes there"
                )
            self._bucket = self._bucket.alone()
            self._bucket.create(MARKER, pretty(_MARK))
        self._writable = True

    def _commit(self, record: Record) -> None:
        key = _record_key(record.name, record.version)
        if not self._bucket.create(key, record.source) and not self._holds(record):
            raise RemoteError(f"{self.address}/{key}: vanished while it was looked at; somebody deletes it, push again")

    def _holds(self, record: Record) -> bool:
        there = self._read(record.name, record.version)
        if there is None:
            return False
        if there.digest != record.digest:
            raise VersionConflictError(
                f"{record.ref} exists in {self.address} as {there.digest[:19]}…, this is {record.digest[:19]}…; "
                "a version never changes: use another version or name"
            )
        return True

    def _keep(self, record: Record, entry: FileEntry, blobs: Blobs, progress: Progress) -> None:
        """Put a file there unless it is. The name of an object proves nothing: its size must fit, and the hash
        that the upload noted with it. Whatever else lies there is replaced."""
        stat = self._bucket.stat(_blob_key(entry))
        if stat is not None and (stat.size, stat.sha256) == (entry.size, entry.sha256):
            return
        path = blobs(entry)
        if not path.is_file() or path.stat().st_size != entry.size or sha256_of(path) != entry.sha256:
            raise CorruptAdapterError(
                f"{record.ref} {entry.path}: the bytes in this hub are not the recorded ones ({path}); pull it again "
                "from another hub, then push"
            )
        what = f"{record.ref} {entry.path}"
        self._bucket.upload(_blob_key(entry), path, entry.sha256, lambda done: progress(what, done, entry.size))

    def _part(self, entry: FileEntry, start: int, length: int) -> bytes:
        data = self._bucket.read(_blob_key(entry), length, start) if length else b""
        if data is None or len(data) < length:
            state = "is missing from" if data is None else "is shorter than recorded in"
            raise CorruptAdapterError(
                f"{entry.path}: blob sha256:{entry.sha256[:12]}… {state} {self.address}; push it again from a hub "
                "that has it"
            )
        return data

    def _read(self, name: str, version: int) -> Record | None:
        key = _record_key(name, version)
        data = self._bucket.read(key, _LIMIT)
        return None if data is None else self._parse(key, data)

    def _parse(self, key: str, data: bytes) -> Record:
        record = record_from_bytes(data, f"{self.address}/{key}")
        if key != _record_key(record.name, record.version):
            raise CorruptAdapterError(
                f"{self.address}/{key}: holds {record.ref}; a record was moved by hand, put it back"
            )
        return record

    def _versions(self, name: str) -> list[int]:
        home = f"records/{check_stored_name(name)}"
        matches = (_RECORD.fullmatch(f"{name}/{key}") for key in self._bucket.keys(home) if "/" not in key)
        return sorted(int(match["version"]) for match in matches if match)

    def _version(self, ref: AdapterRef) -> int | None:
        if ref.version is not None:
            return ref.version
        if ref.alias is not None:
            return objects_aliases.current(self._bucket, ref.name).get(ref.alias)
        return max(self._versions(ref.name), default=None)

    def _of_name(self, name: str, digest: str) -> Record | None:
        """The newest record of a name with a digest; only records that mention it are parsed."""
        keys = [_record_key(name, version) for version in reversed(self._versions(name))]
        for key, data in self._bucket.read_many(keys, _LIMIT):
            if digest.encode() in data:
                record = self._parse(key, data)
                if record.digest == digest:
                    return record
        return None

    def _names_but(self, known: str) -> Iterator[str]:
        yield from (name for name in self.listing() if name != known)

    def _hint(self, name: str) -> str:
        from difflib import get_close_matches

        listing = self.listing()
        if name in listing:
            aliases = ", ".join(objects_aliases.current(self._bucket, name)) or "none"
            return f"{name} has the versions {', '.join(map(str, listing[name][-10:]))}; its aliases: {aliases}"
        close = get_close_matches(name, listing, n=3, cutoff=0.5)
        if close:
            return f"did you mean {' or '.join(close)}?"
        names = [*listing][:10]
        return f"it has {', '.join(names)}{', …' if len(listing) > 10 else ''}" if names else "it is empty"


def _blob_key(entry: FileEntry) -> str:
    return f"blobs/sha256/{entry.sha256[:2]}/{entry.sha256}"


def _record_key(name: str, version: int) -> str:
    return f"records/{check_stored_name(name)}/{version}.json"


def _signatures(record: Record) -> str:
    return f"signatures/{check_stored_name(record.name)}/{record.version}"


def open_remote(address: str) -> ObjectRemote:
    """The hub to push to, or to list. Nothing is asked yet."""
    return ObjectRemote(Bucket.open(address))


def split_remote_ref(address: str) -> tuple[ObjectRemote, str]:
    """The hub and the reference in `s3://bucket/prefix/org/name@1`: the longest part that is a hub, and the rest."""
    bucket = Bucket.open(address)
    for count in (1, 2):  # a name has one part or two
        split = bucket.below(count)
        if split is not None and (remote := ObjectRemote(split[0])).is_hub():
            return remote, str(AdapterRef.parse(split[1]))
    raise RemoteError(
        f"{bucket.address}: no hub on this path; wanted the address of a hub and a reference behind it, such as "
        f"{bucket.address.partition('://')[0]}://bucket/prefix/name@1"
    )
