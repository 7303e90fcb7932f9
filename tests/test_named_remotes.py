"""Names for remotes: what is kept, what is refused, and that no secret gets in or out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from graftory.cli import cli
from graftory.errors import CorruptAdapterError, GraftoryError, InvalidNameError, RemoteError
from graftory.hub import Hub
from graftory.hub.depot import Depot
from graftory.hub.named import add_remote, remotes, remove_remote, resolve_address
from tests.hub_samples import lora, same, snapshot

CANARY = "Kanarienvogel17"
Run = Callable[..., Result]


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    return Depot(Hub.create(tmp_path / "hub").root)


@pytest.fixture
def run(depot: Depot) -> Run:
    def call(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["--registry", str(depot.root), *arguments])

    return call


def as_json(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_names_are_kept_sorted_in_one_readable_file(depot: Depot) -> None:
    assert remotes(depot) == {}
    for name, address in (("origin", "s3://team/adapters"), ("back-up", "file:///srv/hub"), ("trec", "hf://org/trec")):
        add_remote(depot, name, address)
    path = depot.folder / "remotes.json"
    assert path.read_text() == (
        '{\n  "back-up": "file:///srv/hub",\n  "origin": "s3://team/adapters",\n  "trec": "hf://org/trec"\n}\n'
    )
    assert list(remotes(depot)) == ["back-up", "origin", "trec"]
    before = path.stat()
    add_remote(depot, "origin", "s3://team/adapters")
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert remove_remote(depot, "origin") == "s3://team/adapters"
    assert list(remotes(depot)) == ["back-up", "trec"]


def test_a_name_is_not_moved_in_silence(depot: Depot) -> None:
    add_remote(depot, "origin", "s3://team/adapters")
    with pytest.raises(RemoteError, match="'origin' is s3://team/adapters already; remove it first"):
        add_remote(depot, "origin", "s3://other/adapters")
    with pytest.raises(RemoteError, match="no remote 'other'; this hub knows origin"):
        remove_remote(depot, "other")
    assert remotes(depot) == {"origin": "s3://team/adapters"}


@pytest.mark.parametrize(
    "name", ["", "s3", "hf", "file", "memory", "https", "a/b", "a@1", "a:b", "A", "a b", "../a", ".", "é", "x" * 65]
)
def test_impossible_names(depot: Depot, name: str) -> None:
    before = snapshot(depot.root)
    with pytest.raises(InvalidNameError, match="cannot name a remote"):
        add_remote(depot, name, "s3://team/adapters")
    assert snapshot(depot.root) == before


@pytest.mark.parametrize(
    "address",
    [
        "s3://user:SECRET@bucket/prefix",
        "s3://SECRET@bucket/prefix",
        "s3://KEY:SECRET/RET@bucket/prefix",
        "s3://user%3ASECRET%40bucket/prefix",
        "https://user:SECRET@host/hub",
        "hf://user:SECRET@org/repo",
        "s3://bucket/prefix?token=SECRET",
        "s3://bucket/prefix#SECRET",
        "https://host/hub?X-Amz-Signature=SECRET",
        "hf://org/hf_SECRET",
        "hf_SECRET",
        "s3://AKIASECRET/x",
    ],
)
def test_a_secret_is_neither_kept_nor_repeated(depot: Depot, run: Run, address: str) -> None:
    canary = "KANARIENVOGEL17" if "AKIA" in address else CANARY + "x" * 8
    before = snapshot(depot.root)
    result = run("remote", "add", "origin", address.replace("SECRET", canary))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the address holds a user, a password, a token")
    assert canary not in result.output
    assert snapshot(depot.root) == before


@pytest.mark.parametrize(
    "address",
    [
        "",
        "nowhere",
        "/srv/hub",
        "srv/hub",
        "ftp://host/folder",
        "https://host/hub",
        "S3://bucket",
        "://x",
        "file://",
        "file:///",
        "file://relative",
        "s3://",
        "s3:///prefix",
        "hf://org/repo@1",
        "hf://org/repo:prod",
        "s3://bucket/a\nb",
        "s3://bucket/a\x00",
    ],
)
def test_impossible_addresses(depot: Depot, address: str) -> None:
    before = snapshot(depot.root)
    with pytest.raises(RemoteError, match="not the address of"):
        add_remote(depot, "origin", address)
    assert snapshot(depot.root) == before


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("file:///elsewhere/trec@1", "file:///elsewhere/trec@1"),
        ("hf://org/repo@main", "hf://org/repo@main"),
        ("disk", "file:///srv/hub"),
        ("disk/trec@1", "file:///srv/hub/trec@1"),
        ("disk/org/trec:prod", "file:///srv/hub/org/trec:prod"),
        ("disk/trec", "file:///srv/hub/trec"),
        ("bucket/trec@1", "s3://team/adapters/trec@1"),
        ("bucket", "s3://team/adapters"),
        ("trec", "hf://org/trec"),
        ("trec@1", "hf://org/trec@1"),
        ("trec:prod", "hf://org/trec:prod"),
        ("trec@0123abc", "hf://org/trec@0123abc"),
    ],
)
def test_a_name_stands_for_its_address(depot: Depot, text: str, address: str) -> None:
    add_remote(depot, "disk", "file:///srv/hub/")
    add_remote(depot, "bucket", "s3://team/adapters")
    add_remote(depot, "trec", "hf://org/trec")
    assert resolve_address(depot, text).rstrip("/") == address


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere", "this hub knows disk, trec; wanted the name of one or file:///folder"),
        ("nowhere/trec@1", "is not a remote"),
        ("", "is not a remote"),
        ("/srv/hub", "is not a remote"),
        ("@1", "is not a remote"),
        ("disk@1", "hub of many adapters, file:///srv/hub; wanted disk/NAME@1"),
        ("disk:prod", "wanted disk/NAME:prod"),
        ("trec/other@1", "trec is one adapter, hf://org/trec"),
        ("Disk", "is not a remote"),
    ],
)
def test_what_no_name_stands_for(depot: Depot, text: str, words: str) -> None:
    add_remote(depot, "disk", "file:///srv/hub")
    add_remote(depot, "trec", "hf://org/trec")
    with pytest.raises(RemoteError) as caught:
        resolve_address(depot, text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b'{"a": 1}',
        b'{"a": "s3://x", "a": "s3://y"}',
        b'{"a": "nowhere"}',
        b'{"s3": "s3://x"}',
        b'{"a": "s3://user:' + CANARY.encode() + b'@bucket"}',
        b"\xff",
        b"[" * 5000,
        b'{"a": "' + b"x" * (1 << 20) + b'"}',
    ],
    ids=range(11),
)
def test_a_damaged_file_is_one_error(depot: Depot, run: Run, data: bytes) -> None:
    (depot.folder / "remotes.json").write_bytes(data)
    with pytest.raises(CorruptAdapterError, match=r"remotes\.json"):
        remotes(depot)
    for arguments in (["list"], ["add", "b", "s3://x"], ["remove", "a"]):
        result = run("remote", *arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert CANARY not in result.output
    assert (depot.folder / "remotes.json").read_bytes() == data
    with pytest.raises(GraftoryError):
        resolve_address(depot, "a")


def test_the_command(depot: Depot, run: Run) -> None:
    assert "hub remote add" in run("remote", "list").output
    assert as_json(run("remote", "list", "--json")) == {}
    assert run("remote", "add", "origin", "s3://team/adapters").output == "origin is s3://team/adapters\n"
    added = as_json(run("remote", "add", "disk", "file:///srv/hub", "--json"))
    assert added == {"name": "disk", "address": "file:///srv/hub"}
    assert [line.split() for line in run("remote", "list").output.splitlines()] == [
        ["name", "address"],
        ["disk", "file:///srv/hub"],
        ["origin", "s3://team/adapters"],
    ]
    assert as_json(run("remote", "list", "--json")) == {"disk": "file:///srv/hub", "origin": "s3://team/adapters"}
    assert as_json(run("remote", "remove", "origin", "--json"))["address"] == "s3://team/adapters"
    assert run("remote", "remove", "origin").stderr == "error: no remote 'origin'; this hub knows disk\n"


def test_push_and_pull_by_name(depot: Depot, run: Run, tmp_path: Path) -> None:
    hub, adapter = Hub.open(depot.root), lora(1)
    hub.put("trec", adapter)
    assert run("remote", "add", "origin", (tmp_path / "remote").as_uri()).exit_code == 0
    assert run("push", "trec@1", "origin").exit_code == 0
    other = Hub.create(tmp_path / "other")
    arguments = ["--registry", str(other.root)]
    assert CliRunner().invoke(cli, [*arguments, "remote", "add", "up", (tmp_path / "remote").as_uri()]).exit_code == 0
    assert CliRunner().invoke(cli, [*arguments, "pull", "up/trec@1"]).exit_code == 0
    assert same(other.get("trec@1"), adapter)
    result = run("push", "trec@1", "upstream")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "this hub knows origin" in result.stderr
