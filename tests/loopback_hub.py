"""A stand-in of the Hugging Face Hub on the loopback, for the unmodified client over real HTTP.

It speaks what `huggingface_hub` says for model repositories: repositories, preupload, LFS batch and PUT, commits with
their parent, tags, branches, refs, trees, and files by range. Content is kept as the hub keeps it: small files in the
commit, `*.safetensors` and whatever is large by their sha256, which is checked when they come in.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Json = Any
LFS_FROM = 10 << 20
ZERO = "0" * 40


@dataclass(frozen=True)
class Stored:
    """A file of a commit."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """Git's name of the file, or of the pointer in its place."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        body = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@dataclass
class RepoState:
    """One repository: refs to commits, commits to files."""

    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def commit(self, ref: str, files: dict[str, Stored], title: str) -> str:
        said = json.dumps([ref, len(self.commits), sorted((path, file.oid) for path, file in files.items())])
        sha = hashlib.sha1(said.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        self.titles.append(title)
        return sha

    def resolve(self, revision: str) -> str | None:
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.refs[name]
        return revision if revision in self.commits else None

    def at(self, revision: str) -> dict[str, Stored]:
        return self.commits[self.resolve(revision) or ""]


@dataclass
class Faults:
    """What goes wrong on purpose; a counter says how often still."""

    break_downloads_after: int | None = None
    fail_commits: int = 0
    fail_tags: int = 0
    corrupt: str | None = None
    """A file whose bytes are flipped on their way out."""
    ignore_ranges: bool = False
    status: int | None = None
    """Every answer."""


@dataclass
class Request:
    """One request that came in."""

    method: str
    path: str
    range: str | None
    authorization: str | None


class LoopbackHub:
    """The server and what it holds."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.repos: dict[str, RepoState] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults = Faults()
        self.lock = threading.RLock()

        class Handler(_Handler):
            hub = self

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def paths(self, method: str = "GET") -> list[str]:
        return [request.path for request in self.requests if request.method == method]

    def put(self, repo: str, files: dict[str, bytes]) -> str:
        """A commit on `main` that did not come through the API, as if from before."""
        state = self.repos.setdefault(repo, RepoState(private=False))
        stored = {path: Stored(data, path.endswith((".safetensors", ".bin"))) for path, data in files.items()}
        return state.commit("refs/heads/main", stored, "by hand")


@contextmanager
def loopback_hub(token: str | None = None) -> Iterator[LoopbackHub]:
    """A server until the block ends."""
    hub = LoopbackHub(token)
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET  # noqa: N815 (the base class's names)

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        auth = self.headers.get("Authorization")
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), auth))
            if self.hub.faults.status is not None:
                return self._error(self.hub.faults.status, "", f"it echoes {auth} and {self.path}")
            for pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match:
                    return answer(self, match, body)
        return self._error(404, "", f"no route {path}")

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None and cut < len(body):
            self.close_connection = True

    def _json(self, value: Json, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _may(self) -> bool:
        return self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _repo(self, name: str, *, write: bool = False) -> RepoState | None:
        """A repository, or an answer that there is none; the hub does not tell private from missing."""
        state = self.hub.repos.get(name)
        if state is None or ((state.private or write) and not self._may()):
            self._error(404 if self._may() else 401, "RepoNotFound", "Repository not found")
            return None
        return state

    def create(self, _: re.Match[str], body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self._may():
            return self._error(401, "", f"Invalid credentials: {self.headers.get('Authorization')}")
        if name in self.hub.repos:
            return self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        state = self.hub.repos[name] = RepoState(private)
        state.commit("refs/heads/main", {".gitattributes": Stored(b"*.safetensors filter=lfs\n", False)}, "initial")
        return self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self, _: re.Match[str], body: bytes) -> None:
        del body
        self._json({"errors": [], "warnings": []})

    def preupload(self, match: re.Match[str], body: bytes) -> None:
        state = self._repo(match[1], write=True)
        if state is not None:
            here = state.at(match[2])
            self._json({"files": [self._preuploaded(file, here) for file in json.loads(body)["files"]]})

    def _preuploaded(self, file: Json, here: dict[str, Stored]) -> Json:
        lfs = file["path"].endswith((".safetensors", ".bin")) or file["size"] > LFS_FROM
        oid = here[file["path"]].oid if file["path"] in here else None
        return {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

    def batch(self, match: re.Match[str], body: bytes) -> None:
        if self._repo(match[1], write=True) is None:
            return
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append({**item, **({} if item["oid"] in self.hub.objects else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, match: re.Match[str], body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != match[1]:
            return self._error(400, "BadDigest", "the bytes are not what their name says")
        self.hub.objects[match[1]] = body
        return self._json({})

    def commit(self, match: re.Match[str], body: bytes) -> None:
        state = self._repo(match[1], write=True)
        if state is None:
            return None
        if self.hub.faults.fail_commits:
            self.hub.faults.fail_commits -= 1
            return self._error(400, "", "the commit failed on purpose")
        head = state.resolve(match[2])
        header, *operations = (json.loads(line) for line in body.splitlines())
        parent = header["value"].get("parentCommit")
        if parent and parent != head:
            return self._error(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(state.commits[head or ""])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._error(400, "", f"LFS object {value['oid']} is missing")
                files[value["path"]] = Stored(self.hub.objects[value["oid"]], True)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        sha = state.commit(f"refs/heads/{match[2]}", files, header["value"]["summary"])
        url = f"{self.hub.url}/{match[1]}/commit/{sha}"
        return self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def tag(self, match: re.Match[str], body: bytes) -> None:
        state = self._repo(match[1], write=True)
        if state is None:
            return None
        if self.hub.faults.fail_tags:
            self.hub.faults.fail_tags -= 1
            return self._error(400, "", "the tag failed on purpose")
        ref = f"refs/tags/{json.loads(body)['tag']}"
        if ref in state.refs:
            return self._error(409, "", "Tag reference exists already")
        state.refs[ref] = state.resolve(match[2]) or ""
        return self._json({})

    def branch(self, match: re.Match[str], body: bytes) -> None:
        state = self._repo(match[1], write=True)
        if state is None:
            return None
        if f"refs/heads/{match[2]}" in state.refs:
            return self._error(409, "", "Reference exists already")
        start = (json.loads(body) if body else {}).get("startingPoint") or "main"
        state.refs[f"refs/heads/{match[2]}"] = state.resolve(start) or ""
        return self._json({})

    def refs(self, match: re.Match[str], body: bytes) -> None:
        del body
        state = self._repo(match[1])
        if state is not None:
            found = {
                kind: [
                    {"name": ref.removeprefix(start), "ref": ref, "targetCommit": sha}
                    for ref, sha in state.refs.items()
                    if ref.startswith(start)
                ]
                for kind, start in (("branches", "refs/heads/"), ("tags", "refs/tags/"))
            }
            self._json({**found, "converts": [], "pullRequests": []})

    def info(self, match: re.Match[str], body: bytes) -> None:
        del body
        state = self._repo(match[1])
        if state is None:
            return None
        sha = state.resolve(match[2] or "main")
        if sha is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        files = state.commits[sha]
        data: Json = {"_id": "0", "id": match[1], "modelId": match[1], "sha": sha, "private": state.private}
        data |= {"siblings": [{"rfilename": path} for path in files], "tags": [], "downloads": 0, "likes": 0}
        card = files.get("README.md", Stored(b"", False)).data.decode()
        licence = re.search(r"^license: (\S+)$", card, re.MULTILINE)
        return self._json({**data, "cardData": {"license": licence[1]} if licence else {}})

    def tree(self, match: re.Match[str], body: bytes) -> None:
        del body
        state = self._repo(match[1])
        if state is None:
            return None
        sha = state.resolve(match[2])
        if sha is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        folder = f"{match[3]}/" if match[3] else ""
        found = {path: file for path, file in state.commits[sha].items() if path.startswith(folder)}
        if not found:
            return self._error(404, "EntryNotFound", f"{match[3]} does not exist")
        return self._json([self._entry(path, file) for path, file in found.items()])

    def _entry(self, path: str, file: Stored) -> Json:
        lfs = {"lfs": {"oid": file.sha256, "size": len(file.data), "pointerSize": 130}} if file.lfs else {}
        return {"type": "file", "path": path, "size": len(file.data), "oid": file.oid, **lfs}

    def resolve(self, match: re.Match[str], body: bytes) -> None:
        del body
        state = self._repo(match[1])
        if state is None:
            return None
        sha = state.resolve(match[2])
        if sha is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        file = state.commits[sha].get(match[3])
        if file is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        data = file.data
        if self.hub.faults.corrupt == match[3]:
            data = data[:-1] + bytes([data[-1] ^ 1])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.sha256 if file.lfs else file.oid}"', "Accept-Ranges": "bytes"}
        headers |= {"Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(data))}
        cut = self.hub.faults.break_downloads_after if file.lfs else None
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None or self.hub.faults.ignore_ranges:
            return self._send(200, data, headers, cut)
        begin, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        if begin >= len(data):
            return self._send(416, b"", headers)
        headers |= {"Content-Range": f"bytes {begin}-{end}/{len(data)}"}
        return self._send(206, data[begin : end + 1], headers, cut)


_NAME = r"([^/]+/[^/]+)"
_ROUTES: tuple[tuple[str, Callable[[_Handler, re.Match[str], bytes], None]], ...] = (
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/lfs/([0-9a-f]{64})", _Handler.upload),
    (rf"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
    (rf"/api/models/{_NAME}/tag/([^/]+)", _Handler.tag),
    (rf"/api/models/{_NAME}/branch/([^/]+)", _Handler.branch),
    (rf"/api/models/{_NAME}/refs", _Handler.refs),
    (rf"/api/models/{_NAME}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    (rf"/api/models/{_NAME}(?:/revision/([^/]+))?", _Handler.info),
    (rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
