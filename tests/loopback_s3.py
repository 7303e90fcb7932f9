"""An S3 server on loopback: moto's own, with a layer before it that counts, waits, fails and lies on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import pytest

KEY, SECRET, TOKEN = (
    "AKIACANARYCANARY0001",
    "canarySecret/0123456789+abcdefghijklmnop",
    "canary-session-token-0123456789",
)
Answer = tuple[str, bytes]
"""Status line and body."""


@dataclass(frozen=True)
class Request:
    """One request, as it came over the wire."""

    method: str
    path: str
    query: str
    headers: dict[str, str]

    @property
    def what(self) -> str:
        """Method and path without the bucket; a listing's path is the folder that is listed."""
        prefix = parse_qs(self.query).get("prefix", [""])[0]
        kind = "LIST" if "list-type" in self.query else self.method
        return f"{kind} {self.path.split('/', 2)[-1] if kind != 'LIST' else prefix}"


def error(status: str, code: str, text: str = "no") -> Answer:
    """An answer as S3 refuses."""
    return status, f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{text}</Message></Error>'.encode()


@dataclass
class LoopbackS3:
    """The server, and what tests want from it.

    Attributes:
        requests: Every request so far.
        fault: Asked before each request; an answer here is given instead of moto's.
        conditional: Whether If-None-Match is looked at.
    """

    application: Callable[..., Iterable[bytes]]
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    fault: Callable[[Request], Answer | None] = lambda request: None
    conditional: bool = True
    _client: Any = None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        """One request. Puts come one after the other: moto looks and writes in two steps, S3 does not."""
        headers = {key[5:].replace("_", "-"): value for key, value in environ.items() if key.startswith("HTTP_")}
        request = Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("QUERY_STRING", ""), headers)
        self.requests.append(request)
        answer = self.fault(request)
        if answer is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(answer[0], [("Content-Type", "application/xml"), ("Content-Length", str(len(answer[1])))])
            return [answer[1]]
        if not self.conditional:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if request.method in ("GET", "HEAD"):
            return self.application(environ, start)
        with self._lock:
            return list(self.application(environ, start))

    def counts(self) -> dict[str, int]:
        """How many requests of each method since the last call."""
        seen = [request.what.split()[0] for request in self.requests]
        self.requests.clear()
        return {method: seen.count(method) for method in sorted(set(seen))}

    def client(self) -> Any:
        """A plain client, for what a test does behind our back."""
        if self._client is None:
            import boto3  # type: ignore[import-untyped]

            keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
            self._client = boto3.client("s3", endpoint_url=self.url, **keys)
        return self._client

    def reset(self) -> None:
        """Forget every bucket, as moto does when it is asked."""
        urlopen(HttpRequest(f"{self.url}/moto-api/reset", method="POST"), timeout=10).close()

    def keys(self, bucket: str) -> list[str]:
        """Every key of a bucket."""
        found = self.client().list_objects_v2(Bucket=bucket)
        return [item["Key"] for item in found.get("Contents", [])]

    def get(self, bucket: str, key: str) -> bytes:
        """The bytes of an object."""
        data: bytes = self.client().get_object(Bucket=bucket, Key=key)["Body"].read()
        return data


@contextmanager
def serve() -> Iterator[LoopbackS3]:
    """The server on a free port of loopback."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, type: str, message: str, *args: object) -> None:  # noqa: A002 (werkzeug's)
            pass

    s3 = LoopbackS3(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, s3, threaded=True, request_handler=Quiet)
    server.daemon_threads = True  # type: ignore[attr-defined]
    s3.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield s3
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(url: str) -> dict[str, str]:
    """What a client needs to know, with secrets that must never be seen."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": TOKEN,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }


def use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Let this process's clients talk to the server."""
    for name, value in environment(url).items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "GRAFTORY_SINGLE_WRITER", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
