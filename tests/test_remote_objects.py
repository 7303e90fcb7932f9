"""Push and pull between a hub and an object store: real HTTP, the unmodified client, moto behind it."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from click.testing import CliRunner

from graftory.adapter import Adapter, Parent
from graftory.cli import cli
from graftory.errors import (
    AdapterNotFoundError,
    CorruptAdapterError,
    InvalidNameError,
    RemoteError,
    VersionConflictError,
)
from graftory.hub import Hub
from graftory.hub.named import check_address
from graftory.hub.records import FileEntry
from graftory.hub.remotes import objects, objects_aliases, objects_store
from graftory.hub.remotes.objects_errors import describe
from graftory.hub.remotes.objects_store import Bucket
from graftory.hub.signature_store import SignatureStore
from tests.hub_samples import bottleneck, lora, same, snapshot
from tests.loopback_s3 import KEY, SECRET, TOKEN, Answer, LoopbackS3, Request, environment, error, serve, use

HOME = "s3://bucket/hub"
CANARIES = (KEY, SECRET, TOKEN)


@pytest.fixture(scope="module")
def server() -> Iterator[LoopbackS3]:
    """The server; and clients that are made in half the time: the library's own files are parsed once, and the
    garbage collector does not walk over torch."""
    session = import_module("botocore.session")
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch, serve() as s3:
        patch.setattr(session, "create_loader", cache(session.create_loader))
        yield s3
    gc.unfreeze()


@pytest.fixture
def s3(server: LoopbackS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackS3]:
    """The server with one empty bucket, and this process's clients set to it."""
    use(monkeypatch, server.url)
    server.client().create_bucket(Bucket="bucket")
    server.requests.clear()
    yield server
    server.fault, server.conditional = lambda request: None, True
    server.reset()


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub.create(tmp_path / "hub")


@pytest.fixture
def other(tmp_path: Path) -> Hub:
    return Hub.create(tmp_path / "other")


def blob(entry: FileEntry) -> str:
    return f"hub/blobs/sha256/{entry.sha256[:2]}/{entry.sha256}"


def kept(hub: Hub) -> dict[str, bytes]:
    """What a hub holds, without what was put together beside it so far."""
    files = {path.relative_to(hub.root).as_posix(): path for path in hub.root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if "/tmp/" not in name and path.name != "lock"}


def weights(hub: Hub, ref: str = "trec") -> FileEntry:
    return hub.record(ref).files[1]


def when(method: str, part: str, answer: Answer | Callable[[], Answer]) -> Callable[[Request], Answer | None]:
    """A fault: what the server answers to some requests."""

    def fault(request: Request) -> Answer | None:
        if request.method != method or part not in request.path:
            return None
        return answer() if callable(answer) else answer

    return fault


@pytest.mark.parametrize("ref", ["trec", "trec@2", "trec:prod", "digest"])
def test_round_trip_keeps_every_byte(ref: str, s3: LoopbackS3, hub: Hub, other: Hub) -> None:
    for seed in (1, 0):
        hub.put("org/trec", lora(seed=seed))
    hub.set_alias("org/trec", "prod", 2)
    hub.set_alias("org/trec", "old", 1)
    SignatureStore(hub.root / ".hub").add("org/trec", 2, "ab" * 16, b"signed")
    pushed = hub.push("org/trec@2", HOME)
    assert (pushed.aliases, pushed.signatures) == (("prod",), ("ab" * 16,))
    asked = f"org/trec@{hub.record('org/trec').digest}" if ref == "digest" else f"org/{ref}"
    pulled = other.pull(f"{HOME}/{asked}")
    assert (str(pulled.ref), pulled.aliases, pulled.signatures) == ("org/trec@2", ("prod",), ("ab" * 16,))
    assert other.aliases("org/trec") == {"prod": 2}
    files = {name: data for name, data in snapshot(hub.root).items() if "2" in name}
    assert len(files) == 2  # the record and the signature
    assert files.items() <= snapshot(other.root).items()
    assert same(other.get("org/trec"), lora())
    for key in s3.keys("bucket"):
        local = key.removeprefix("hub/")
        if not local.startswith(("aliases/", "graftory-hub")):
            assert s3.get("bucket", key) == (hub.root / ".hub" / local).read_bytes()


def test_parents_of_a_composition_travel(s3: LoopbackS3, hub: Hub, other: Hub) -> None:
    hub.put("part", bottleneck())
    hub.put("seed", lora(seed=3))
    parents = (
        Parent("part@1", hub.record("part").digest, "composed"),
        Parent("seed@1", hub.record("seed").digest, "merged", 1.0),
    )
    hub.put("whole", lora(parents=parents))
    assert [str(ref) for ref in hub.push("whole", HOME).parents] == ["part@1"]
    assert other.listing(HOME) == {"part": (1,), "whole": (1,)}
    other.pull(f"{HOME}/whole")
    assert same(other.get("part"), bottleneck())
    # a parent that is only there, under another name than the record says, is found by its digest
    renamed = Hub.create(hub.root.parent / "renamed")
    renamed.put("x/other", bottleneck())
    renamed.push("x/other", "s3://bucket/two")
    alone = Hub.create(hub.root.parent / "alone")
    alone.put("whole", lora(parents=parents[:1]))
    assert str(alone.push("whole", "s3://bucket/two").ref) == "whole@1"
    alone.put("lost", lora(parents=(Parent("part@1", "sha256:" + "0" * 64, "composed"),)))
    with pytest.raises(AdapterNotFoundError, match="composed of part@1"):
        alone.push("lost", "s3://bucket/two")


def test_only_what_is_missing_travels(s3: LoopbackS3, hub: Hub, other: Hub) -> None:
    hub.put("trec", lora())
    hub.push("trec", HOME)
    s3.requests.clear()
    hub.push("trec", HOME)
    assert "PUT" not in s3.counts()
    hub.put("trec", lora(seed=1))  # the same configuration, other weights
    hub.push("trec", HOME)
    sent = [request.what for request in s3.requests if request.method == "PUT"]
    assert sent == ["PUT hub/graftory-hub.json", f"PUT {blob(weights(hub))}", "PUT hub/records/trec/2.json"]
    other.pull(f"{HOME}/trec@1")
    s3.requests.clear()
    other.pull(f"{HOME}/trec@2")
    fetched = [request.what for request in s3.requests if "blobs" in request.path]
    assert fetched == [f"GET {blob(weights(hub))}"]
    s3.requests.clear()
    other.pull(f"{HOME}/trec@2")
    assert not [request for request in s3.requests if "blobs" in request.path]


def test_requests_of_each_operation(s3: LoopbackS3, hub: Hub, other: Hub) -> None:
    """The costs that docs/remotes/objects.md states."""
    for seed in (0, 1, 2):
        hub.put("trec", lora(seed=seed))
    hub.push("trec@1", HOME)
    assert s3.counts() == {"GET": 3, "HEAD": 3, "LIST": 4, "PUT": 5}
    hub.push("trec@2", HOME)  # its configuration is there; no aliases: s3fs asks twice more
    assert s3.counts() == {"GET": 2, "HEAD": 3, "LIST": 2, "PUT": 3}
    hub.set_alias("trec", "prod", 3)
    hub.push("trec@3", HOME)
    s3.counts()
    hub.push("trec@3", HOME)
    assert s3.counts() == {"GET": 3, "HEAD": 2, "LIST": 1}
    SignatureStore(hub.root / ".hub").add("trec", 3, "ab" * 16, b"signed")
    hub.push("trec@3", HOME)
    assert s3.counts() == {"GET": 6, "HEAD": 3, "LIST": 4, "PUT": 2}  # the three records are searched for the digest
    other.pull(f"{HOME}/trec@3")
    assert s3.counts() == {"GET": 6, "LIST": 2}
    other.listing(HOME)
    assert s3.counts() == {"GET": 1, "LIST": 1}


def test_progress_ends_at_the_size_and_large_files_go_in_parts(
    s3: LoopbackS3, hub: Hub, other: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects_store, "PART", 5 << 20)  # the least that S3 takes
    monkeypatch.setattr(objects, "PART", 5 << 20)
    small = lora()
    adapter = Adapter(
        small.spec,
        {
            key: value.repeat(1, 230_000) if key == "classifier.weight" else value
            for key, value in small.tensors.items()
        },
    )
    hub.put("trec", adapter)
    size = weights(hub).size
    assert size > 2 * (5 << 20)
    calls: list[tuple[str, int, int]] = []
    hub.push("trec", HOME, progress=lambda *call: calls.append(call))
    mine = [done for what, done, total in calls if what == "trec@1 adapter_model.safetensors" and total == size]
    assert mine == sorted(mine)
    assert (len(mine), mine[-1]) == (-(-size // (5 << 20)), size)
    assert [q.method for q in s3.requests if "uploadId" in q.query] == ["PUT"] * len(mine) + ["POST"]
    s3.requests.clear()
    calls.clear()
    other.pull(f"{HOME}/trec", progress=lambda *call: calls.append(call))
    assert [q.headers["RANGE"] for q in s3.requests if blob(weights(hub)) in q.path][-1].endswith(f"-{size - 1}")
    assert calls[-1] == ("trec@1 adapter_model.safetensors", size, size)
    assert same(other.get("trec"), adapter)


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What several threads return or raise that start at the same instant."""
    barrier = Barrier(count)

    def run(index: int) -> Any:
        barrier.wait()
        try:
            return work(index)
        except (VersionConflictError, RemoteError) as caught:
            return caught

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_of_eight_pushers_one_wins_and_the_others_go_on_with_the_next_version(s3: LoopbackS3, tmp_path: Path) -> None:
    hubs = [Hub.create(tmp_path / str(index)) for index in range(8)]
    for index, hub in enumerate(hubs):
        hub.put("trec", lora(seed=index))
    results = together(8, lambda index: hubs[index].push("trec@1", HOME))
    lost = [index for index, result in enumerate(results) if isinstance(result, VersionConflictError)]
    assert len(lost) == 7, results
    (winner,) = set(range(8)) - set(lost)
    assert s3.get("bucket", "hub/records/trec/1.json") == hubs[winner].record("trec").source

    def retry(index: int) -> int:
        hub, remote = hubs[index], objects.open_remote(HOME)
        while True:
            version = max(remote.listing()["trec"]) + 1
            for number in range(len(hub.versions("trec")) + 1, version + 1):
                hub.put("trec", lora(seed=100 * (index + 1) + number))
            try:
                hub.push(f"trec@{version}", HOME)
            except VersionConflictError:
                continue
            return version

    versions = together(7, lambda place: retry(lost[place]))
    assert sorted(versions) == [2, 3, 4, 5, 6, 7, 8]
    for place, version in enumerate(versions):
        assert (
            s3.get("bucket", f"hub/records/trec/{version}.json") == hubs[lost[place]].record(f"trec@{version}").source
        )


def test_two_first_pushes_at_one_time(s3: LoopbackS3, hub: Hub, other: Hub) -> None:
    """The prefix was no hub when the first looked, and is not empty any more when it looks again."""
    hub.put("trec", lora())
    other.put("sms", lora())
    first = True

    def overtake(request: Request) -> None:
        nonlocal first
        if first and request.what == "LIST hub/":
            first = False
            other.push("sms", HOME)

    s3.fault = overtake
    hub.push("trec", HOME)
    assert not first
    assert hub.listing(HOME) == {"sms": (1,), "trec": (1,)}


def test_of_eight_moves_of_aliases_none_is_lost(s3: LoopbackS3, hub: Hub) -> None:
    for seed in (0, 1):
        hub.put("trec", lora(seed=seed))
        hub.push("trec", HOME)
    remotes = [objects.open_remote(HOME) for _ in range(8)]
    results = together(
        8, lambda index: remotes[index].move_alias("trec", ("prod", f"a{index}")[index % 2], 1 + index // 4)
    )
    assert results == [None] * 8
    bucket = Bucket.open(HOME)
    log = objects_aliases.log(bucket, "trec")
    # four move `prod` to 1 or 2: those that find it there need no entry
    assert {move.alias for move in log} == {"prod", "a1", "a3", "a5", "a7"}
    replayed: dict[str, int] = {move.alias: move.version for move in log}
    assert objects_aliases.current(bucket, "trec") == dict(sorted(replayed.items()))
    count = len(log)
    assert together(8, lambda index: remotes[index].move_alias("trec", f"b{index}", 2)) == [None] * 8
    assert len(objects_aliases.log(bucket, "trec")) == count + 8
    assert {f"b{index}" for index in range(8)} <= objects_aliases.current(bucket, "trec").keys()
    with pytest.raises(AdapterNotFoundError, match="trec@9"):
        remotes[0].move_alias("trec", "prod", 9)


def test_a_lost_answer_is_not_a_conflict(s3: LoopbackS3, hub: Hub) -> None:
    """The server kept the object, the answer came too late, the client asks again and is refused: it is ours."""
    hub.put("trec", lora())
    hub.set_alias("trec", "prod", 1)
    real = s3.application
    done: set[str] = set()

    def lose(request: Request) -> Answer | None:
        if request.method != "PUT" or not re.search("/(records|aliases)/", request.path) or request.path in done:
            return None
        done.add(request.path)
        key = request.path.removeprefix("/bucket/")
        data = hub.record("trec").source
        if "aliases" in key:
            return error("503 Slow Down", "SlowDown")
        s3.client().put_object(Bucket="bucket", Key=key, Body=data)
        return error("503 Slow Down", "SlowDown")

    s3.fault = lose
    hub.push("trec", HOME)
    assert s3.application is real
    assert len(done) == 2
    assert objects_aliases.current(Bucket.open(HOME), "trec") == {"prod": 1}


def test_killed_between_files_and_record_nothing_is_there_and_the_repeat_succeeds(
    s3: LoopbackS3, hub: Hub, other: Hub
) -> None:
    hub.put("trec", lora())
    code = (
        "import sys; from graftory.hub import Hub; print(flush=True); sys.stdin.readline(); "
        f"Hub.open(sys.argv[1]).push('trec', {HOME!r})"
    )
    pusher = subprocess.Popen(
        [sys.executable, "-c", code, str(hub.root)],
        env={**os.environ, **environment(s3.url)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def kill() -> Answer:
        pusher.send_signal(signal.SIGKILL)
        pusher.wait()
        return error("500 Internal Server Error", "InternalError")

    s3.fault = when("PUT", "/records/", kill)
    pusher.communicate(b"\n", timeout=60)
    assert pusher.returncode == -signal.SIGKILL
    s3.fault = lambda request: None
    assert len([key for key in s3.keys("bucket") if "blobs" in key]) == 2
    assert other.listing(HOME) == {}
    with pytest.raises(AdapterNotFoundError, match="it is empty"):
        other.pull(f"{HOME}/trec")
    s3.requests.clear()
    hub.push("trec", HOME)
    assert not [request for request in s3.requests if request.method == "PUT" and "blobs" in request.path]
    other.pull(f"{HOME}/trec")


def test_every_request_that_writes_may_fail(s3: LoopbackS3, hub: Hub) -> None:
    """The n-th PUT fails, n = 1 … 6: no record without its files; the repeat succeeds."""
    hub.put("trec", lora())
    hub.set_alias("trec", "prod", 1)
    puts, nth = 0, 0

    def fault(request: Request) -> Answer | None:
        nonlocal puts
        puts += request.method == "PUT"
        return error("500 Internal Server Error", "InternalError") if request.method == "PUT" and puts == nth else None

    s3.fault = fault
    for nth in range(1, 7):
        puts, home = 0, f"s3://bucket/hub{nth}"
        with pytest.raises(RemoteError, match="the server fails or is busy"):
            hub.push("trec", home)
        keys = [key for key in s3.keys("bucket") if key.startswith(f"hub{nth}/")]
        assert len([key for key in keys if "blobs" in key]) == min(max(nth - 3, 0), 2)
        assert (f"hub{nth}/records/trec/1.json" in keys) == (nth == 6)
        hub.push("trec", home)
    puts, nth = 0, 0
    hub.push("trec", "s3://bucket/hub7")
    assert puts == 6
    written = {key.split("/", 1)[1]: s3.get("bucket", key) for key in s3.keys("bucket") if key.startswith("hub7/")}
    for key, data in written.items():
        if "aliases" not in key:  # with the time in it
            assert all(s3.get("bucket", f"hub{number}/{key}") == data for number in range(1, 7))
    other = Hub.create(hub.root.parent / "other")
    assert other.pull("s3://bucket/hub5/trec:prod").aliases == ("prod",)


def test_a_download_that_was_cut_goes_on_at_the_byte(
    s3: LoopbackS3, hub: Hub, other: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PART", 64)
    hub.put("trec", lora())
    hub.push("trec", HOME)
    path, calls = blob(weights(hub)), 0

    def cut() -> Answer:
        return error("500 Internal Server Error", "InternalError")

    def fault(request: Request) -> Answer | None:
        nonlocal calls
        calls += path in request.path
        return cut() if path in request.path and calls > 4 else None

    s3.fault = fault
    with pytest.raises(RemoteError, match="goes on"):
        other.pull(f"{HOME}/trec")
    assert other.index() == ()
    s3.fault = lambda request: None
    s3.requests.clear()
    other.pull(f"{HOME}/trec")
    ranges = [request.headers["RANGE"] for request in s3.requests if path in request.path]
    assert ranges[0] == "bytes=256-319"
    assert same(other.get("trec"), lora())


@pytest.mark.parametrize("damage", ["changed", "shorter", "longer", "gone", "empty"])
def test_a_damaged_object_is_refused_and_the_next_push_replaces_it(
    damage: str, s3: LoopbackS3, hub: Hub, other: Hub
) -> None:
    hub.put("trec", lora())
    hub.push("trec", HOME)
    key = blob(weights(hub))
    data = s3.get("bucket", key)
    s3.client().delete_object(Bucket="bucket", Key=key)
    changed = {
        "changed": data[:-1] + bytes([data[-1] ^ 1]),
        "shorter": data[: len(data) // 2],
        "longer": data + b"x",
        "empty": b"",
    }
    if damage != "gone":
        s3.client().put_object(Bucket="bucket", Key=key, Body=changed[damage])
    before = kept(other)
    if damage == "longer":  # what was promised is there; what follows is never looked at
        other.pull(f"{HOME}/trec")
    else:
        with pytest.raises(CorruptAdapterError):
            other.pull(f"{HOME}/trec")
        assert kept(other) == before
    hub.push("trec", HOME)
    assert s3.get("bucket", key) == data
    other.pull(f"{HOME}/trec")
    assert same(other.get("trec"), lora())


def test_a_damaged_record_alias_or_marker_is_refused(s3: LoopbackS3, hub: Hub, other: Hub) -> None:
    hub.put("trec", lora())
    hub.put("sms", lora(seed=1))
    hub.set_alias("trec", "prod", 1)
    for name in ("trec", "sms"):
        hub.push(name, HOME)
    client, record = s3.client(), s3.get("bucket", "hub/records/trec/1.json")
    for body, text in (
        (record.replace(b'"mit"', b'"gpl"'), "not what its digest says"),
        (record[:-20], "not acceptable JSON"),
        (b"", "not acceptable JSON"),
        (s3.get("bucket", "hub/records/sms/1.json"), "moved by hand"),
    ):
        client.put_object(Bucket="bucket", Key="hub/records/trec/1.json", Body=body)
        with pytest.raises(CorruptAdapterError, match=text):
            other.pull(f"{HOME}/trec")
    client.put_object(Bucket="bucket", Key="hub/records/trec/1.json", Body=record)
    client.put_object(Bucket="bucket", Key="hub/aliases/trec/00000002.json", Body=b'{"alias": 1}')
    with pytest.raises(CorruptAdapterError, match=r"aliases/trec/00000002\.json"):
        other.pull(f"{HOME}/trec:prod")
    assert other.index() == ()
    client.put_object(Bucket="bucket", Key="hub/graftory-hub.json", Body=b'{"format": "graftory-objects", "schema": 2}')
    with pytest.raises(RemoteError, match="newer graftory"):
        other.listing(HOME)
    with pytest.raises(RemoteError, match="newer graftory"):
        hub.push("trec", HOME)


@pytest.mark.parametrize("length", [None, 10])
def test_damage_in_this_hub_is_not_pushed(length: int | None, s3: LoopbackS3, hub: Hub) -> None:
    hub.put("trec", lora())
    path = hub.root / ".hub" / blob(weights(hub)).removeprefix("hub/")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data[:length])
    with pytest.raises(CorruptAdapterError, match=r"trec@1 adapter_model.safetensors"):
        hub.push("trec", HOME)
    assert not [key for key in s3.keys("bucket") if "records" in key or blob(weights(hub)) == key]


def test_other_bytes_under_the_version_are_a_conflict_both_ways(s3: LoopbackS3, hub: Hub, other: Hub) -> None:
    hub.put("trec", lora())
    other.put("trec", lora(seed=1))
    hub.push("trec", HOME)
    keys, before = s3.keys("bucket"), snapshot(other.root)
    with pytest.raises(VersionConflictError, match="use another version"):
        other.push("trec", HOME)
    with pytest.raises(VersionConflictError):
        other.pull(f"{HOME}/trec")
    assert (s3.keys("bucket"), snapshot(other.root)) == (keys, before)


@pytest.mark.parametrize("refuses", [False, True])
def test_a_server_without_conditions_is_refused_unless_there_is_one_writer(
    refuses: bool, s3: LoopbackS3, hub: Hub, other: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("trec", lora())
    hub.set_alias("trec", "prod", 1)
    s3.conditional = False
    if refuses:
        s3.fault = lambda request: (
            error("501 Not Implemented", "NotImplemented") if "IF-NONE-MATCH" in request.headers else None
        )
    for _ in range(2):  # the second time the marker may be there
        with pytest.raises(RemoteError, match=r"cannot keep two writers apart.*GRAFTORY_SINGLE_WRITER=1"):
            hub.push("trec", HOME)
        assert not [key for key in s3.keys("bucket") if "records" in key or "blobs" in key]
    monkeypatch.setenv("GRAFTORY_SINGLE_WRITER", "1")
    hub.push("trec", HOME)
    other.pull(f"{HOME}/trec:prod")
    other.put("sms", lora())
    hub.put("sms", lora(seed=1))
    other.push("sms", HOME)
    with pytest.raises(VersionConflictError):
        hub.push("sms", HOME)


def secrets_in(text: str) -> list[str]:
    return [canary for canary in CANARIES if canary in text]


FAILURES: dict[str, tuple[Answer, str]] = {
    "wrong key": (error("403 Forbidden", "InvalidAccessKeyId", f"no key {KEY}"), "credentials are refused"),
    "wrong secret": (error("403 Forbidden", "SignatureDoesNotMatch", SECRET), "credentials are refused"),
    "expired": (error("400 Bad Request", "ExpiredToken", f"{TOKEN} expired"), "credentials are refused"),
    "denied": (error("403 Forbidden", "AccessDenied", f"arn {KEY}"), "access is denied"),
    "no bucket": (error("404 Not Found", "NoSuchBucket"), "no such bucket"),
    "region": (error("400 Bad Request", "AuthorizationHeaderMalformed"), "AWS_REGION"),
    "clock": (error("403 Forbidden", "RequestTimeTooSkewed"), "clock"),
    "unknown": (error("418 Teapot", "Strange", f"odd\n{SECRET} {TOKEN} {KEY}"), r"store answered OSError: .*\*\*\*"),
    "not xml": (("200 OK", b"<html>" + SECRET.encode()), "hub|JSON|answer"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_a_server_refuses_is_told_in_one_line_without_secrets(
    name: str, s3: LoopbackS3, hub: Hub, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    answer, text = FAILURES[name]
    hub.put("trec", lora())
    s3.fault = lambda request: answer
    caplog.set_level("INFO")
    for arguments in (["push", "trec", HOME], ["pull", f"{HOME}/trec"], ["list", HOME]):
        result = CliRunner().invoke(cli, ["--registry", str(hub.root), *arguments])
        assert result.exit_code != 0
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        (line,) = [line for line in result.output.splitlines() if line.lower().startswith("error")]
        assert re.search(text, line)
        assert not secrets_in(result.output)
    with pytest.raises((RemoteError, CorruptAdapterError), match=text) as caught:
        hub.push("trec", HOME)
    chain: list[BaseException | None] = [caught.value]
    while chain[-1] is not None:
        assert not secrets_in(repr(chain[-1]))
        chain.append(chain[-1].__cause__ or (None if chain[-1].__suppress_context__ else chain[-1].__context__))
    captured = capfd.readouterr()
    assert not secrets_in(captured.out + captured.err + caplog.text)


def test_no_secret_is_stored_or_sent_in_a_body(s3: LoopbackS3, hub: Hub, other: Hub) -> None:
    hub.put("trec", lora())
    hub.push("trec", HOME)
    other.pull(f"{HOME}/trec")
    stored = b"".join(s3.get("bucket", key) for key in s3.keys("bucket"))
    stored += b"".join(path.read_bytes() for path in other.root.rglob("*") if path.is_file())
    assert not secrets_in(stored.decode("latin-1"))
    assert not secrets_in("".join(request.path + request.query for request in s3.requests))
    assert any(
        TOKEN in request.headers.values() for request in s3.requests
    )  # the server did see them where they belong


def test_nobody_answers_and_no_credentials(s3: LoopbackS3, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("trec", lora())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    with pytest.raises(RemoteError, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
        hub.push("trec", HOME)
    use(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(RemoteError, match="cannot be reached; check the network and the endpoint"):
        hub.push("trec", HOME)
    use(monkeypatch, "nonsense")
    with pytest.raises(RemoteError, match="Invalid endpoint"):
        hub.push("trec", HOME)


@pytest.mark.parametrize(
    "address",
    [
        f"s3://{KEY}:{SECRET}@bucket/hub",
        f"s3://{KEY}:a/b@bucket/hub",
        f"s3://user@bucket/hub?secret={SECRET}",
        f"s3://bucket/hub?key={KEY}",
        f"s3://bucket/hub#{SECRET}",
        "s3://",
        "s3:///hub",
        "s3://bucket/a/../b",
        "s3://bucket//a",
    ],
)
def test_addresses_that_are_refused_and_not_repeated(address: str, s3: LoopbackS3, hub: Hub) -> None:
    hub.put("trec", lora())
    for call in (lambda: hub.push("trec", address), lambda: hub.pull(f"{address}/trec"), lambda: hub.listing(address)):
        with pytest.raises(RemoteError, match="address") as caught:
            call()
        assert not secrets_in(str(caught.value))
    assert s3.requests == []


def test_where_a_hub_may_be(s3: LoopbackS3, hub: Hub, other: Hub) -> None:
    hub.put("trec", lora())
    with pytest.raises(RemoteError, match="no hub there"):
        other.listing(HOME)
    with pytest.raises(RemoteError, match="no hub on this path"):
        other.pull(f"{HOME}/trec")
    hub.push("trec", "s3://bucket/a/b/")
    with pytest.raises(RemoteError, match="lies inside the hub s3://bucket/a/b;"):
        hub.push("trec", "s3://bucket/a/b/org/trec")
    with pytest.raises(RemoteError, match="holds other things"):
        hub.push("trec", "s3://bucket/a")
    with pytest.raises(RemoteError, match="no such bucket"):
        hub.push("trec", "s3://nowhere/hub")
    with pytest.raises(AdapterNotFoundError, match="did you mean trec"):
        other.pull("s3://bucket/a/b/trek")
    with pytest.raises(AdapterNotFoundError, match="has the versions 1; its aliases: none"):
        other.pull("s3://bucket/a/b/trec@2")
    with pytest.raises(AdapterNotFoundError, match="no trec:prod in"):
        other.pull("s3://bucket/a/b/trec:prod")
    with pytest.raises(InvalidNameError):
        other.pull("s3://bucket/a/b/A!")
    assert str(other.pull("s3://bucket/a/b/trec").ref) == "trec@1"
    s3.client().put_object(Bucket="bucket", Key="placeholder/", Body=b"")  # as a console makes a folder
    hub.push("trec", "s3://bucket/placeholder")


def test_the_root_of_a_bucket_and_what_strangers_left_there(s3: LoopbackS3, hub: Hub, other: Hub) -> None:
    hub.put("org/trec", lora())
    hub.push("org/trec", "s3://bucket")
    for key in ("records/x.json", "records/UP/1.json", "records/trec/01.json", "records/a/b/c/1.json", "notes.txt"):
        s3.client().put_object(Bucket="bucket", Key=key, Body=b"{}")
    s3.client().put_object(Bucket="bucket", Key="signatures/org/trec/1/../../x.json", Body=b"{}")
    s3.client().put_object(Bucket="bucket", Key=f"signatures/org/trec/1/{'cd' * 16}.json", Body=b"x" * ((1 << 20) + 9))
    assert other.listing("s3://bucket") == {"org/trec": (1,)}
    assert other.pull("s3://bucket/org/trec").signatures == ("cd" * 16,)
    assert SignatureStore(other.root / ".hub").of("org/trec", 1) == {"cd" * 16: b""}


def test_a_missing_package_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("trec", lora())
    for scheme, module, package in (("s3", "s3fs", "graftory[s3]"), ("gs", "gcsfs", "gcsfs"), ("az", "adlfs", "adlfs")):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(import_module("fsspec.registry")._registry, scheme, raising=False)
        with pytest.raises(RemoteError, match=re.escape(f"pip install '{package}'")):
            hub.push("trec", f"{scheme}://bucket/hub")


def test_memory_round_trip(hub: Hub, other: Hub) -> None:
    home = "memory://graftory-test/hub"
    hub.put("trec", lora())
    hub.set_alias("trec", "prod", 1)
    SignatureStore(hub.root / ".hub").add("trec", 1, "ab" * 16, b"signed")
    assert hub.push("trec", home).aliases == ("prod",)
    sent: list[str] = []
    hub.push("trec", home, progress=lambda what, done, total: sent.append(what))
    assert sent == []
    assert other.pull(f"{home}/trec:prod").signatures == ("ab" * 16,)
    assert same(other.get("trec"), lora())
    assert (other.root / ".hub/records/trec/1.json").read_bytes() == hub.record("trec").source
    Hub.create(hub.root.parent / "third").put("trec", lora(seed=1))
    with pytest.raises(VersionConflictError):
        Hub.open(hub.root.parent / "third").push("trec", home)
    assert other.listing(home) == {"trec": (1,)}


def test_of_eight_writers_in_memory_one_wins() -> None:
    buckets = [Bucket.open("memory://graftory-race") for _ in range(8)]
    assert sum(together(8, lambda index: buckets[index].create("x", str(index).encode()))) == 1


def test_two_writers_at_one_instant_come_again(s3: LoopbackS3) -> None:
    """S3 answers 409 to both where two conditional puts meet."""
    answers = [error("409 Conflict", "ConditionalRequestConflict")] * 2
    s3.fault = lambda request: answers.pop() if request.method == "PUT" and answers else None
    bucket = Bucket.open(HOME)
    assert bucket.create("x", b"1")
    assert not bucket.create("x", b"2")
    assert (answers, bucket.read("x", 9)) == ([], b"1")


def test_a_server_that_does_not_know_ranges_is_refused(s3: LoopbackS3) -> None:
    s3.client().put_object(Bucket="bucket", Key="hub/x", Body=b"0123456789")
    bucket = Bucket.open(HOME)
    assert (bucket.read("x", 4, 3), bucket.read("x", 4, 10), bucket.read("y", 4)) == (b"3456", b"", None)
    s3.fault = lambda request: ("200 OK", b"0123456789")
    with pytest.raises(RemoteError, match="does not know ranges"):
        bucket.read("x", 4, 3)


def test_mistakes_of_ours_are_not_hidden() -> None:
    bucket = Bucket.open("memory://graftory-mistake")
    with pytest.raises(TypeError):
        replace(bucket, kind=replace(bucket.kind, create=lambda: None)).create("x", b"")  # type: ignore[arg-type, misc]
    assert "TimeoutError" in describe(TimeoutError("late"))


def test_peek_reads_no_more_than_asked(s3: LoopbackS3, hub: Hub) -> None:
    hub.put("trec", lora())
    hub.push("trec", HOME)
    s3.requests.clear()
    remote, entry = objects.open_remote(HOME), weights(hub)
    data = (hub.root / ".hub" / blob(entry).removeprefix("hub/")).read_bytes()
    assert remote.peek(hub.record("trec"), entry, 8) == data[:8]
    assert [request.headers["RANGE"] for request in s3.requests] == ["bytes=0-7"]
    assert remote.peek(hub.record("trec"), entry, 10**9) == data


def test_commands_and_named_remotes(s3: LoopbackS3, hub: Hub, other: Hub) -> None:
    def run(root: Path, *arguments: str) -> str:
        result = CliRunner().invoke(cli, ["--registry", str(root), *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    hub.put("org/trec", lora())
    hub.set_alias("org/trec", "prod", 1)
    for address in (HOME, "gs://bucket/hub", "az://container/hub", "memory://hub"):
        assert check_address(address) == address
    run(hub.root, "remote", "add", "origin", HOME)
    assert "org/trec@1" in run(hub.root, "push", "org/trec", "origin")
    assert "org/trec" in run(other.root, "list", HOME)
    assert json.loads(run(other.root, "list", HOME, "--json"))
    assert "org/trec@1" in run(other.root, "pull", f"{HOME}/org/trec:prod")
    run(other.root, "remote", "add", "origin", HOME)
    assert "org/trec@1" in run(other.root, "pull", "origin/org/trec@1")
    assert other.aliases("org/trec") == {"prod": 1}
