"""The Hugging Face Hub as the remote sees it: refs, files at a commit, commits, tags; its errors in our words.

`huggingface_hub` does the talking. Of HTTP only the download is done here, with its session and headers, as
a download must go on where an earlier one was broken off, at any byte.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftory.errors import AdapterNotFoundError, GraftoryError, RemoteError
from graftory.hub.files import KEPT, disk, empty
from graftory.hub.redact import redact

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

_STALE = (409, 412)
"""What the hub answers if the branch has moved on since the parent commit."""


class StaleError(Exception):
    """Somebody else has committed in between: look again."""


@dataclass(frozen=True, slots=True)
class Refs:
    """Where branches and tags of a repository point, by commit."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class RepoFile:
    """A file at a commit; `sha256` only where the hub keeps it (large files)."""

    path: str
    size: int
    sha256: str | None


class Repo:
    """One model repository.

    Args:
        id: `org/name`.
    """

    def __init__(self, id: str) -> None:  # noqa: A002 (what the hub calls it)
        self.id = id

    def create(self) -> None:
        """Make it, private, unless it is there."""
        with self._hub() as api:
            api.create_repo(self.id, private=True, exist_ok=True)

    def refs(self) -> Refs:
        """Its branches and tags.

        Raises:
            RemoteError: If there is no such repository, or it is not ours to see.
        """
        with self._hub() as api:
            found = api.list_repo_refs(self.id)
        return Refs(
            {ref.name: ref.target_commit for ref in found.branches}, {ref.name: ref.target_commit for ref in found.tags}
        )

    def commit_of(self, revision: str) -> str:
        """The commit that a branch, tag or commit means.

        Raises:
            AdapterNotFoundError: If there is no such revision.
        """
        with self._hub() as api:
            commit = api.model_info(self.id, revision=revision).sha
        if commit is None:
            raise AdapterNotFoundError(f"hf://{self.id}: no revision {revision!r:.80}")
        return commit

    def licence(self, commit: str) -> str | None:
        """What the card says."""
        with self._hub() as api:
            data = api.model_info(self.id, revision=commit).card_data
        found = getattr(data, "license", None)
        return found if isinstance(found, str) else None

    def files(self, commit: str, folder: str | None = None) -> list[RepoFile]:
        """The files at a commit, or in one folder of it; none if there is no such folder."""
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.hf_api import RepoFile as Entry

        try:
            with self._hub(EntryNotFoundError) as api:
                found = list(api.list_repo_tree(self.id, folder, recursive=True, revision=commit))
        except EntryNotFoundError:
            return []
        return [
            RepoFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None)
            for entry in found
            if isinstance(entry, Entry)
        ]

    def read(self, commit: str, path: str, *, limit: int) -> bytes | None:
        """A small file at a commit; None if it is not there. Of a larger one, `limit` bytes come."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            with self._get(commit, path, (0, limit - 1), EntryNotFoundError) as response:
                return _first_bytes(response, limit)
        except EntryNotFoundError:
            return None

    def download(self, commit: str, path: str, size: int, target: Path, progress: Callable[[int], None]) -> None:
        """Make `target` hold a file, going on behind what it holds already."""
        with disk(target, KEPT), target.open("ab") as file:
            if file.tell() > size:
                empty(file)
            if file.tell() == size:
                return
            with self._get(commit, path, (file.tell(), None) if file.tell() else None) as response:
                if response.status_code != 206:  # the server does not do ranges
                    empty(file)
                for chunk in response.iter_bytes():
                    file.write(chunk)
                    progress(file.tell())
                    if file.tell() > size:
                        raise RemoteError(f"hf://{self.id}: {path} is longer than {size} bytes; pull it again")

    def commit(
        self, branch: str, parent: str, operations: Sequence[CommitOperationAdd | CommitOperationDelete], message: str
    ) -> str:
        """Commit on top of `parent`, all or nothing.

        Raises:
            StaleError: If the branch has moved on.
        """
        with _utils().disable_progress_bars(), self._hub(stale=True) as api:
            return api.create_commit(
                self.id, operations, commit_message=message, revision=branch, parent_commit=parent
            ).oid

    def tag(self, name: str, commit: str) -> None:
        """Tag a commit.

        Raises:
            StaleError: If there is such a tag.
        """
        with self._hub(stale=True) as api:
            api.create_tag(self.id, tag=name, revision=commit)

    def branch(self, name: str, commit: str) -> None:
        """Make a branch that begins at a commit; one that is there stays."""
        with self._hub() as api:
            api.create_branch(self.id, branch=name, revision=commit, exist_ok=True)

    @contextmanager
    def _get(
        self, commit: str, path: str, span: tuple[int, int | None] | None, *let_pass: type[Exception]
    ) -> Iterator[Any]:
        """The answer to a request for a file, or a part of it."""
        from huggingface_hub import hf_hub_url

        hub = _utils()
        headers = {**hub.build_hf_headers(), "Accept-Encoding": "identity"}
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{'' if span[1] is None else span[1]}"
        url = hf_hub_url(self.id, path, revision=commit, endpoint=_endpoint())
        stream = hub.get_session().stream("GET", url, headers=headers, follow_redirects=True)
        with self._translated(*let_pass), stream as response:
            hub.hf_raise_for_status(response)
            yield response

    @contextmanager
    def _hub(self, *let_pass: type[Exception], stale: bool = False) -> Iterator[HfApi]:
        from huggingface_hub import HfApi

        with self._translated(*let_pass, stale=stale):
            yield HfApi(endpoint=_endpoint(), library_name="graftory")

    @contextmanager
    def _translated(self, *let_pass: type[Exception], stale: bool = False) -> Iterator[None]:
        """Errors of the library as ours, in one line, without secrets and without their cause, which has some."""
        passing: tuple[type[Exception], ...] = (GraftoryError, *let_pass)
        try:
            yield
        except Exception as error:
            if isinstance(error, passing) or not isinstance(error, _library_errors()):
                raise
            found = _cause_of(error)
        else:
            return
        status = getattr(getattr(found, "response", None), "status_code", None)
        if stale and status in _STALE:
            raise StaleError
        raise _explained(f"hf://{self.id}", found, status)


def _first_bytes(response: Any, limit: int) -> bytes:
    data = b""
    for chunk in response.iter_bytes():
        data += chunk
        if len(data) >= limit:
            break
    return data[:limit]


def _utils() -> Any:
    """The library's helpers, which it does not export by name for type checkers."""
    return import_module("huggingface_hub.utils")


def _endpoint() -> str:
    """The hub's address as it is now: the library reads the variable once, when it is imported."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _library_errors() -> tuple[type[Exception], ...]:
    """What the library and the HTTP client that it uses (its name depends on the version) raise."""
    from huggingface_hub import errors

    client = import_module(type(_utils().get_session()).__module__.partition(".")[0])
    return (
        errors.HfHubHTTPError,
        errors.EntryNotFoundError,
        errors.HFValidationError,
        errors.LocalTokenNotFoundError,
        errors.OfflineModeIsEnabled,
        client.HTTPError,
        client.InvalidURL,
        ConnectionError,
        TimeoutError,
        ValueError,
        RuntimeError,
    )


def _cause_of(error: Exception) -> Exception:
    """What an error wraps: uploads say only which file they were at."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


_REMEDIES: Mapping[str, str] = {
    "GatedRepoError": "it is gated: ask for access on its page, then hf auth login",
    "RepositoryNotFoundError": "no such repository, or it is not yours to see; check the name, and hf auth login",
    "LocalTokenNotFoundError": "no token; hf auth login, or set HF_TOKEN",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set; unset it",
    "HFValidationError": "no name of a repository; wanted hf://org/repo",
}
_NOT_THERE: Mapping[str, str] = {
    "RevisionNotFoundError": "no such version, branch, tag or commit there",
    "RemoteEntryNotFoundError": "a file of it is not there",
    "EntryNotFoundError": "a file of it is not there",
}
_STATUS: Mapping[int, str] = {
    401: "the hub does not know the token; hf auth login, or set HF_TOKEN",
    403: "the token may not do this; log in with one that has write access",
    413: "the hub refuses files of this size",
    429: "too many requests; wait a few minutes and try again",
    507: "the account has no room left",
}


def _explained(address: str, error: Exception, status: int | None) -> GraftoryError:
    kind = type(error).__name__
    if kind in _NOT_THERE:
        return AdapterNotFoundError(f"{address}: {_NOT_THERE[kind]}; hub list {address} tells its versions")
    said = _REMEDIES.get(kind) or _STATUS.get(status or 0)
    if said is None:
        reason = " ".join(redact(str(error)).split())[:200] or kind
        said = f"the hub cannot be used ({reason}); check the network and try again"
    return RemoteError(f"{address}: {said}")
