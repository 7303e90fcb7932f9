"""How versions lie in a repository of the Hugging Face Hub, and how they are found there."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from graftory.errors import AdapterNotFoundError, CorruptAdapterError, RemoteError
from graftory.hub import strict_json
from graftory.hub.contents import check_file_names
from graftory.hub.records import Record, record_from_bytes
from graftory.hub.remotes.base import Foreign
from graftory.hub.remotes.huggingface_client import Refs, Repo, StaleError

RECORD = "graftory-record.json"
ALIASES = "graftory-aliases.json"
SIGNATURES = "graftory-signatures"
PARENTS = "parents"
CARD = "README.md"
MAIN = "main"
_TAG = re.compile(r"v([1-9][0-9]{0,8})")
_TRIES = 12
"""How often a commit is tried again because others committed in between."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the files of an adapter lie."""

    commit: str
    folder: str = ""

    def path(self, file: str) -> str:
        """The path of a file in the repository."""
        return f"{self.folder}{file}"


@dataclass(frozen=True, slots=True)
class State:
    """A repository at one moment.

    Attributes:
        refs: Its branches and tags.
        newest: The version at `main`, if a version is there.
    """

    refs: Refs
    newest: Record | None

    @property
    def head(self) -> str:
        """The commit at the end of `main`."""
        return self.refs.branches[MAIN]

    @property
    def versions(self) -> dict[int, str]:
        """Commits of the versions; the one at `main` counts even if its tag is not there yet."""
        tagged = {int(match[1]): commit for tag, commit in self.refs.tags.items() if (match := _TAG.fullmatch(tag))}
        return {**({self.newest.version: self.head} if self.newest else {}), **tagged}


class Versions:
    """The versions in a repository, read.

    Args:
        repo: The repository.
    """

    def __init__(self, repo: Repo) -> None:
        self.repo = repo
        self.places: dict[str, Place] = {}
        """Where what was read lies, by digest; by source for an adapter without a record."""

    @property
    def address(self) -> str:
        """Its address."""
        return f"hf://{self.repo.id}"

    def until_nobody_interferes(self, step: Callable[[State], T]) -> T:
        """Look and do a step; look and do it again if somebody else committed between the two.

        Raises:
            RemoteError: If that goes on and on.
        """
        for attempt in range(_TRIES):
            try:
                return step(self.look())
            except StaleError:  # noqa: PERF203 (that is the point)
                time.sleep(random.uniform(0, 0.05 * 2**attempt))
        raise RemoteError(f"{self.address}: others commit all the time; try again later")

    def look(self) -> State:
        """The repository as it is now.

        Raises:
            RemoteError: If it is not there, or has no `main`.
        """
        refs = self.repo.refs()
        head = refs.branches.get(MAIN)
        if head is None:
            raise RemoteError(f"{self.address}: has no branch {MAIN!r}; use a model repository that has")
        return State(refs, self.read(head))

    def read(self, commit: str, folder: str = "") -> Record | None:
        """The record at a commit, and note where its files lie."""
        data = self.repo.read(commit, f"{folder}{RECORD}", limit=strict_json.LARGE + 1)
        if data is None:
            return None
        record = record_from_bytes(data, f"{self.address}@{commit[:12]} {folder}{RECORD}")
        check_file_names(record)
        self.places[record.digest] = Place(commit, folder)
        return record

    def commit_of(self, state: State, ref: str) -> str:
        """What a reference means: empty, `@3`, `@sha256:...`, `:alias`, or `@` and a branch, tag or commit.

        Raises:
            AdapterNotFoundError: If it means nothing there.
        """
        kind, wanted = ref[:1], ref[1:]
        if not ref:
            return state.versions[max(state.versions)] if state.versions else state.head
        if kind == ":":
            version = self.aliases(state).get(wanted)
            if version is None:
                raise AdapterNotFoundError(
                    f"{self.address}: no alias {wanted!r:.80}; there are {listed(self.aliases(state))}"
                )
            return self._version(state, version)
        if wanted.startswith("sha256:"):
            record = self.find(wanted)
            if record is None:
                raise AdapterNotFoundError(f"{self.address}: no version has the digest {wanted:.80}")
            return self.places[record.digest].commit
        return self._version(state, int(wanted)) if wanted.isdecimal() else self.repo.commit_of(wanted)

    def _version(self, state: State, version: int) -> str:
        if version not in state.versions:
            raise AdapterNotFoundError(
                f"{self.address}: no version {version}; there are {listed(sorted(state.versions))}"
            )
        return state.versions[version]

    def aliases(self, state: State) -> dict[str, int]:
        """What each alias means."""
        data = self.repo.read(state.head, ALIASES, limit=strict_json.SMALL + 1)
        if data is None:
            return {}
        where = f"{self.address} {ALIASES}"
        content = strict_json.loads(data, where)
        found = content.get("aliases") if isinstance(content, dict) else None
        if not isinstance(found, dict) or not all(type(version) is int for version in found.values()):
            raise CorruptAdapterError(f"{where}: not an object of aliases and versions; mend it in the repository")
        return found

    def place(self, item: Record | Foreign) -> Place:
        """Where the files of an adapter lie."""
        key = item.digest if isinstance(item, Record) else item.source
        if key not in self.places and isinstance(item, Record):
            self.find(item.digest)
        if key not in self.places:
            raise AdapterNotFoundError(f"{self.address}: {item.name} is not there any more")
        return self.places[key]

    def find(self, digest: str) -> Record | None:
        """The record with a digest: a parent beside what was asked for, or a version."""
        if digest in self.places:
            place = self.places[digest]
            return self.read(place.commit, place.folder)
        folder = f"{PARENTS}/{digest.removeprefix('sha256:')}/"
        for commit in dict.fromkeys(place.commit for place in self.places.values()):
            found = self.read(commit, folder)
            if found is not None and found.digest == digest:
                return found
        try:
            state = self.look()
        except RemoteError:
            return None  # nothing is there yet
        records = (self.read(commit) for commit in state.versions.values())
        return next((record for record in records if record and record.digest == digest), None)


def hex_of(record: Record) -> str:
    """The digest as a name in paths."""
    return record.digest.removeprefix("sha256:")


def folder_of(parent: Record) -> str:
    """Where the files of a parent lie."""
    return f"{PARENTS}/{hex_of(parent)}/"


def branch_of(record: Record) -> str:
    """Where a version lies that came after a newer one."""
    return f"version-{record.version}"


def listed(values: Iterable[object]) -> str:
    """Values for an error text."""
    return ", ".join(map(str, values)) or "none"
