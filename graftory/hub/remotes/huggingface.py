"""A repository of the Hugging Face Hub as the hub of one name: `hf://org/repo` (docs/remotes/huggingface.md).

Each version is one commit, tagged `v1`, `v2`, ...: its files at the root, as plain PEFT loads them, beside
`graftory-record.json`, the model card and the parents that it is composed of. The newest is at `main`; a
version that comes after a newer one has a branch of its own. The commit is what decides: of several
pushers of one version the hub takes one commit, as each names the commit it was made on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from graftory.errors import AdapterNotFoundError, CorruptAdapterError, RemoteError, VersionConflictError
from graftory.hub.contents import check_file_names
from graftory.hub.files import sha256_of
from graftory.hub.records import FileEntry, Record
from graftory.hub.remotes import huggingface_foreign
from graftory.hub.remotes.base import Blobs, Foreign
from graftory.hub.remotes.card import card, is_untouched
from graftory.hub.remotes.huggingface_client import Refs, Repo, StaleError
from graftory.hub.remotes.huggingface_versions import (
    ALIASES,
    CARD,
    MAIN,
    PARENTS,
    RECORD,
    SIGNATURES,
    Place,
    State,
    Versions,
    branch_of,
    folder_of,
    hex_of,
)
from graftory.hub.signature_store import MAX_BYTES
from graftory.hub.strict_json import SMALL
from graftory.progress import Progress
from graftory.schema import pretty

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

_ADDRESS = re.compile(r"hf://([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:/|([@:].{1,200}))?")


class HuggingFaceRemote:
    """One repository. See `Remote` for what each method promises."""

    def __init__(self, repo: str) -> None:
        self._repo = Repo(repo)
        self._versions = Versions(self._repo)

    @property
    def address(self) -> str:
        """See `Remote`."""
        return self._versions.address

    def listing(self) -> Mapping[str, tuple[int, ...]]:
        """See `Remote`; empty for a repository without records."""
        state = self._versions.look()
        return {state.newest.name: tuple(sorted(state.versions))} if state.newest else {}

    def record(self, ref: str) -> Record | Foreign:
        """See `Remote`. `ref` is empty, `@3`, `@sha256:...`, `:alias`, or `@` and a branch, tag or commit."""
        commit = self._versions.commit_of(self._versions.look(), ref)
        found = self._versions.read(commit)
        if found is not None:
            return found
        item = huggingface_foreign.find(self._repo, commit)
        self._versions.places[item.source] = Place(commit)
        return item

    def find(self, digest: str, hint: str) -> Record | None:  # noqa: ARG002 (one repository is one name)
        """See `Remote`."""
        return self._versions.find(digest)

    def peek(self, item: Record | Foreign, entry: FileEntry, length: int) -> bytes:
        """See `Remote`."""
        place = self._versions.place(item)
        data = self._repo.read(place.commit, place.path(entry.path), limit=length)
        if data is None:
            raise CorruptAdapterError(f"{self.address}: {item.name} lacks {entry.path}; push it again")
        return data

    def fetch(self, item: Record | Foreign, entry: FileEntry, target: Path, progress: Callable[[int], None]) -> None:
        """See `Remote`."""
        place = self._versions.place(item)
        self._repo.download(place.commit, place.path(entry.path), entry.size, target, progress)

    def send(self, records: Sequence[Record], blobs: Blobs, progress: Progress) -> None:
        """See `Remote`. What a broken push committed and did not tag is tagged by the next one."""
        self._repo.create()
        self._versions.until_nobody_interferes(partial(self._send, records, blobs, progress))

    def aliases(self, name: str) -> Mapping[str, int]:
        """See `Remote`."""
        state = self._versions.look()
        return self._versions.aliases(state) if state.newest and state.newest.name == name else {}

    def move_alias(self, name: str, alias: str, version: int) -> None:
        """See `Remote`."""

        def move(state: State) -> None:
            if state.newest is None or state.newest.name != name or version not in state.versions:
                raise AdapterNotFoundError(f"{name}@{version} is not in {self.address}; push it first")
            before = self._versions.aliases(state)
            if before.get(alias) != version:
                data = pretty({"schema": 1, "aliases": dict(sorted({**before, alias: version}.items()))})
                self._repo.commit(MAIN, state.head, [_add(ALIASES, data)], f"{name}:{alias} means {name}@{version}")

        self._versions.until_nobody_interferes(move)

    def signatures(self, record: Record) -> Mapping[str, bytes]:
        """See `Remote`."""
        head = self._versions.look().head
        folder = f"{SIGNATURES}/{hex_of(record)}"
        found = {}
        for file in self._repo.files(head, folder):
            key_id = Path(file.path).stem
            if file.path == f"{folder}/{key_id}.json" and file.size <= MAX_BYTES:
                found[key_id] = self._repo.read(head, file.path, limit=MAX_BYTES) or b""
        return found

    def add_signatures(self, record: Record, signatures: Mapping[str, bytes]) -> None:
        """See `Remote`."""
        folder = f"{SIGNATURES}/{hex_of(record)}"

        def add(state: State) -> None:
            known = {file.path for file in self._repo.files(state.head, folder)}
            paths = {f"{folder}/{key_id}.json": data for key_id, data in signatures.items()}
            new = [_add(path, data) for path, data in paths.items() if path not in known]
            if new:
                self._repo.commit(MAIN, state.head, new, f"signatures of {record.ref}")

        self._versions.until_nobody_interferes(add)

    def _send(self, records: Sequence[Record], blobs: Blobs, progress: Progress, state: State) -> None:
        """Commit the last record and its parents, unless it is there.

        Raises:
            StaleError: If somebody else committed since `state`.
        """
        *parents, record = records
        self._check_name(state, record)
        if self._is_there(state, record):
            return
        if state.newest is not None:
            self._tag(state.newest, state.head, state.refs)
        branch, parent = self._branch_for(state, record)
        operations = self._operations(record, parents, blobs, parent, progress)
        commit = self._repo.commit(branch, parent, operations, f"{record.name} version {record.version}")
        self._tag(record, commit, state.refs)

    def _is_there(self, state: State, record: Record) -> bool:
        """Whether the version is here already; if its tag is not, it is made.

        Raises:
            VersionConflictError: If it is here with other content.
        """
        commit = state.versions.get(record.version) or state.refs.branches.get(branch_of(record))
        there = self._versions.read(commit) if commit else None
        if commit is None or there is None or there.version != record.version:
            return False
        if there.digest != record.digest:
            raise VersionConflictError(
                f"{record.ref} exists in {self.address} as {there.digest[:19]}…, this is {record.digest[:19]}…; "
                "a version never changes: push another version"
            )
        self._tag(record, commit, state.refs)
        return True

    def _tag(self, record: Record, commit: str, refs: Refs) -> None:
        tag = f"v{record.version}"
        if tag in refs.tags:
            return
        try:
            self._repo.tag(tag, commit)
        except StaleError:  # somebody was quicker, with the same version or with another one
            there = self._versions.read(self._repo.commit_of(tag))
            if there is None or there.digest != record.digest:
                raise VersionConflictError(
                    f"{record.ref}: the tag {tag} of {self.address} means another version; push another one"
                ) from None

    def _branch_for(self, state: State, record: Record) -> tuple[str, str]:
        """The branch to commit on, and the commit at its end."""
        if record.version > max(state.versions, default=0):
            return MAIN, state.head
        branch = branch_of(record)
        self._repo.branch(branch, state.head)
        return branch, self._repo.commit_of(branch)

    def _check_name(self, state: State, record: Record) -> None:
        if state.newest is None:
            if any(file.path == "adapter_config.json" for file in self._repo.files(state.head)):
                raise RemoteError(
                    f"{self.address}: holds an adapter that graftory did not push; push to a repository of its own"
                )
        elif state.newest.name != record.name:
            raise RemoteError(
                f"{self.address}: holds the versions of {state.newest.name!r}; push {record.name!r} to a repository of "
                "its own"
            )

    def _operations(
        self, record: Record, parents: Sequence[Record], blobs: Blobs, commit: str, progress: Progress
    ) -> list[CommitOperationAdd | CommitOperationDelete]:
        """What turns the tree at a commit into that of a version."""
        from huggingface_hub import CommitOperationDelete

        before = self._versions.read(commit)
        present = {file.path for file in self._repo.files(commit)}
        adds = _files(record, "", blobs, progress)
        for parent in parents:
            adds += _files(parent, folder_of(parent), blobs, progress)
        if CARD not in present or self._card_is_ours(commit):
            adds.append(_add(CARD, card(record, repo=self._repo.id)))
        stale = {entry.path for entry in before.files} if before else set()
        stale |= {path for path in present if path.startswith(f"{PARENTS}/")}
        gone = (stale & present) - {operation.path_in_repo for operation in adds}
        return [*adds, *(CommitOperationDelete(path) for path in sorted(gone))]

    def _card_is_ours(self, commit: str) -> bool:
        """Whether the card is as graftory made it: what a person wrote since is kept."""
        there = self._repo.read(commit, CARD, limit=SMALL)
        return there is not None and is_untouched(there)


def _files(record: Record, folder: str, blobs: Blobs, progress: Progress) -> list[CommitOperationAdd]:
    """The files of a version, hashed.

    Raises:
        CorruptAdapterError: If a file is not what its record says.
    """
    from huggingface_hub import CommitOperationAdd

    check_file_names(record)
    operations = [_add(f"{folder}{RECORD}", record.source)]
    for entry in record.files:
        path = blobs(entry)
        progress(f"{record.ref} {entry.path}", 0, entry.size)
        if not path.is_file() or sha256_of(path) != entry.sha256:
            raise CorruptAdapterError(
                f"{record.ref} {entry.path}: the bytes here are not the recorded ones; pull it from another hub"
            )
        operations.append(CommitOperationAdd(f"{folder}{entry.path}", path))
        progress(f"{record.ref} {entry.path}", entry.size, entry.size)
    return operations


def _add(path: str, data: bytes) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path, data)


def open_remote(address: str) -> HuggingFaceRemote:
    """The repository to push to; it is made when something is pushed.

    Raises:
        RemoteError: If the address names no repository, or a version in one.
    """
    repo, ref = _split(address)
    if ref:
        raise RemoteError(f"{address!r:.200}: a push goes to a repository, not to a version; leave out {ref!r:.80}")
    return HuggingFaceRemote(repo)


def split_remote_ref(address: str) -> tuple[HuggingFaceRemote, str]:
    """The repository and the reference of `hf://org/repo`, `...@3`, `...@main`, `...:prod`.

    Raises:
        RemoteError: If the address names no repository.
    """
    repo, ref = _split(address)
    return HuggingFaceRemote(repo), ref


def _split(address: str) -> tuple[str, str]:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise RemoteError(f"{address!r:.200}: wanted hf://org/repo, hf://org/repo@3 or hf://org/repo:alias")
    return match[1], match[2] or ""
