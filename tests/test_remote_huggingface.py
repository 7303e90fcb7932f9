"""The Hugging Face Hub as a remote, over real HTTP: the unmodified client and a stand-in of the hub."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub import HfApi, ModelCard

from graftory.adapter import Parent
from graftory.cli import cli
from graftory.errors import (
    AdapterNotFoundError,
    BaseMismatchError,
    CorruptAdapterError,
    GraftoryError,
    RemoteError,
    UnsupportedAdapterError,
    VersionConflictError,
)
from graftory.hub import Hub
from graftory.hub.completeness import gaps
from graftory.hub.keys import create_key, load_private_key, load_public_key
from tests.hub_samples import bottleneck, lora, same, snapshot
from tests.loopback_hub import LoopbackHub, loopback_hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library's own

CANARY = "hf_CANARYcanaryCANARYcanary0123456789"
REPO = "me/trec"
ADDRESS = f"hf://{REPO}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with loopback_hub(token=CANARY) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", CANARY)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
        yield server


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    hub = Hub.create(tmp_path / "hub")
    hub.put("trec", lora(0))
    hub.put("trec", lora(1))
    hub.set_alias("trec", "prod", 1)
    return hub


@pytest.fixture
def other(tmp_path: Path) -> Hub:
    return Hub.create(tmp_path / "other")


def files_of(hub: Hub, ref: str) -> dict[str, bytes]:
    return {entry.path: hub._depot.blobs.path(entry.sha256).read_bytes() for entry in hub.record(ref).files}


def test_there_and_back(server: LoopbackHub, hub: Hub, other: Hub, tmp_path: Path) -> None:
    """Byte for byte: files, records, versions, aliases, signatures."""
    create_key(tmp_path / "key")
    hub.sign("trec@1", load_private_key(tmp_path / "key"))
    assert hub.push("trec@1", ADDRESS).aliases == ("prod",)
    hub.push("trec@2", ADDRESS)
    assert hub.listing(ADDRESS) == {"trec": (1, 2)}
    for ref, wanted in (
        ("", "trec@2"),
        ("@1", "trec@1"),
        (":prod", "trec@1"),
        (f"@{hub.record('trec@1').digest}", "trec@1"),
    ):
        assert str(other.pull(f"{ADDRESS}{ref}").ref) == wanted
    for ref in ("trec@1", "trec@2"):
        assert other.record(ref).source == hub.record(ref).source
        assert files_of(other, ref) == files_of(hub, ref)
    assert other.aliases("trec") == {"prod": 1}
    assert other.verify(["trec@1"], keys=[load_public_key(tmp_path / "key.pub")]).ok
    assert server.repos[REPO].private, "a repository that a push makes is private"


def test_plain_peft_loads_the_root(server: LoopbackHub, hub: Hub) -> None:
    hub.push("trec@1", ADDRESS)
    hub.push("trec@2", ADDRESS)
    state = server.repos[REPO]
    for revision, ref in (("main", "trec@2"), ("v1", "trec@1"), ("v2", "trec@2")):
        tree = state.at(revision)
        assert {path: tree[path].data for path in files_of(hub, ref)} == files_of(hub, ref)
    assert HfApi(endpoint=server.url).hf_hub_download(REPO, "adapter_config.json", revision="v1")


def test_the_card_tells_all(server: LoopbackHub, hub: Hub) -> None:
    hub.push("trec@1", ADDRESS)
    data: Any = ModelCard(server.repos[REPO].at("main")["README.md"].data.decode()).data
    assert (data.base_model, data.library_name, data.license) == ("org/base", "peft", "mit")


def test_a_card_that_a_person_wrote_stays(server: LoopbackHub, hub: Hub) -> None:
    hub.push("trec@1", ADDRESS)
    HfApi(endpoint=server.url).upload_file(path_or_fileobj=b"# Mine", path_in_repo="README.md", repo_id=REPO)
    hub.push("trec@2", ADDRESS)
    assert server.repos[REPO].at("main")["README.md"].data == b"# Mine"


def test_the_second_time_nothing_is_sent(server: LoopbackHub, hub: Hub, other: Hub) -> None:
    hub.push("trec@1", ADDRESS)
    commits = len(server.repos[REPO].commits)
    hub.push("trec@1", ADDRESS)
    assert len(server.repos[REPO].commits) == commits
    other.pull(f"{ADDRESS}@1")
    before = snapshot(other.root)
    server.requests.clear()
    other.pull(f"{ADDRESS}@1")
    assert not [path for path in server.paths() if path.endswith(".safetensors")]
    assert snapshot(other.root) == before


def test_another_kind_of_adapter_leaves_no_old_files(server: LoopbackHub, hub: Hub, other: Hub) -> None:
    hub.push("trec@2", ADDRESS)
    hub.put("trec", bottleneck())
    hub.push("trec@3", ADDRESS)
    names = set(server.repos[REPO].at("main"))
    assert "adapter.safetensors" in names
    assert not {"adapter_config.json", "adapter_model.safetensors"} & names
    other.pull(ADDRESS)
    assert same(other.get("trec"), bottleneck())


def test_an_older_version_does_not_take_the_place_of_a_newer(server: LoopbackHub, hub: Hub, other: Hub) -> None:
    hub.push("trec@2", ADDRESS)
    hub.push("trec@1", ADDRESS)
    hub.push("trec@1", ADDRESS)
    assert hub.listing(ADDRESS) == {"trec": (1, 2)}
    assert str(other.pull(ADDRESS).ref) == "trec@2"
    assert str(other.pull(f"{ADDRESS}@1").ref) == "trec@1"
    assert other.record("trec@1").source == hub.record("trec@1").source


def test_parents_of_a_composition_go_along(server: LoopbackHub, hub: Hub, other: Hub, tmp_path: Path) -> None:
    create_key(tmp_path / "key")
    hub.sign("trec@1", load_private_key(tmp_path / "key"))
    one, two = hub.record("trec@1"), hub.record("trec@2")
    middle = bottleneck()
    lineage = replace(middle.spec.lineage, parents=(Parent("trec@1", one.digest, "composed"),))
    hub.put("middle", replace(middle, spec=replace(middle.spec, lineage=lineage)))
    parents = (Parent("middle@1", hub.record("middle").digest, "composed"), Parent("trec@2", two.digest, "composed"))
    hub.put("both", lora(5, parents=parents))
    hub.push("both", "hf://me/both")
    delivery = other.pull("hf://me/both")
    assert sorted(map(str, delivery.parents)) == ["middle@1", "trec@1", "trec@2"]
    assert other.verify().ok
    assert same(other.get("middle"), hub.get("middle"))
    assert other.verify(["trec@1"], keys=[load_public_key(tmp_path / "key.pub")]).ok
    hub.put("both", lora(6))
    hub.push("both", "hf://me/both")
    assert not [path for path in server.repos["me/both"].at("main") if path.startswith("parents/")]
    third = Hub.create(tmp_path / "third")
    assert len(third.pull("hf://me/both@1").parents) == 3, "the old version still has its parents"


def test_a_push_that_broke_off_between_commit_and_tag_is_mended(server: LoopbackHub, hub: Hub, other: Hub) -> None:
    server.repos.clear()
    HfApi(endpoint=server.url).create_repo(REPO, private=True)
    server.faults.fail_tags = 1
    with pytest.raises(RemoteError, match="failed on purpose"):
        hub.push("trec@1", ADDRESS)
    assert hub.listing(ADDRESS) == {"trec": (1,)}, "the commit decides"
    assert str(other.pull(f"{ADDRESS}@1").ref) == "trec@1"
    hub.push("trec@2", ADDRESS)
    assert {"refs/tags/v1", "refs/tags/v2"} <= set(server.repos[REPO].refs), "the next push tags it"
    assert str(Hub.create(other.root.parent / "third").pull(f"{ADDRESS}@1").ref) == "trec@1"


def test_a_commit_that_failed_leaves_nothing(server: LoopbackHub, hub: Hub, other: Hub) -> None:
    server.faults.fail_commits = 1
    with pytest.raises(RemoteError, match="failed on purpose"):
        hub.push("trec@1", ADDRESS)
    with pytest.raises(AdapterNotFoundError):
        other.pull(ADDRESS)
    hub.push("trec@1", ADDRESS)
    assert str(other.pull(ADDRESS).ref) == "trec@1"


def test_other_content_under_the_version_is_a_conflict(server: LoopbackHub, hub: Hub, other: Hub) -> None:
    hub.push("trec@1", ADDRESS)
    hub.push("trec@2", ADDRESS)
    before = dict(server.repos[REPO].refs)
    other.put("trec", lora(7))
    with pytest.raises(VersionConflictError, match="trec@1 exists in hf://me/trec"):
        other.push("trec@1", ADDRESS)
    assert server.repos[REPO].refs == before


@pytest.mark.parametrize("newest", [0, 9])
def test_of_eight_pushers_one_wins(server: LoopbackHub, tmp_path: Path, newest: int) -> None:
    """On `main`, and on the branch of a version that comes after a newer one; each then pushes its own version."""
    hubs = [Hub.create(tmp_path / f"hub{number}") for number in range(8)]
    for number, hub in enumerate(hubs):
        hub.put("trec", lora(number), version=3)
        hub.put("trec", lora(number), version=10 + number)
    if newest:
        first = Hub.create(tmp_path / "first")
        first.put("trec", lora(99), version=newest)
        first.push(f"trec@{newest}", ADDRESS)
    start = threading.Barrier(8)

    def push(hub: Hub) -> str:
        start.wait()
        try:
            hub.push("trec@3", ADDRESS)
        except VersionConflictError:
            return "conflict"
        return "won"

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(push, hubs))
        assert sorted(results) == ["conflict"] * 7 + ["won"]
        list(pool.map(lambda item: item[1].push(f"trec@{10 + item[0]}", ADDRESS), enumerate(hubs)))
    other = Hub.create(tmp_path / "other")
    assert other.listing(ADDRESS)["trec"] == (3, *([newest] if newest else []), *range(10, 18))
    other.pull(f"{ADDRESS}@3")
    winner = hubs[results.index("won")]
    assert other.record("trec@3").source == winner.record("trec@3").source
    for number, hub in enumerate(hubs):
        other.pull(f"{ADDRESS}@{10 + number}")
        assert files_of(other, f"trec@{10 + number}") == files_of(hub, f"trec@{10 + number}")


def test_aliases_moved_at_the_same_time_are_all_kept(server: LoopbackHub, hub: Hub) -> None:
    hub.push("trec@1", ADDRESS)
    remotes = [Hub.create(hub.root.parent / f"a{number}") for number in range(6)]
    for number, each in enumerate(remotes):
        each.pull(ADDRESS)
        each.set_alias("trec", f"alias{number}", 1)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda each: each.push("trec@1", ADDRESS), remotes))
    content = json.loads(server.repos[REPO].at("main")["graftory-aliases.json"].data)
    assert content["aliases"] == {"prod": 1} | {f"alias{number}": 1 for number in range(6)}


def test_a_broken_download_is_gone_on_with(server: LoopbackHub, hub: Hub, other: Hub) -> None:
    hub.push("trec@1", ADDRESS)
    size = next(entry.size for entry in hub.record("trec@1").files if entry.path.endswith(".safetensors"))
    server.faults.break_downloads_after = 100
    with pytest.raises(RemoteError):
        other.pull(ADDRESS)
    assert other.index() == ()
    server.faults.break_downloads_after = None
    server.requests.clear()
    other.pull(ADDRESS)
    ranges = [request.range for request in server.requests if request.path.endswith(".safetensors")]
    assert ranges == ["bytes=100-"]
    assert size > 100
    assert same(other.get("trec"), lora(0))


def test_a_server_without_ranges(server: LoopbackHub, hub: Hub, other: Hub) -> None:
    hub.push("trec@1", ADDRESS)
    server.faults.break_downloads_after = 100
    with pytest.raises(RemoteError):
        other.pull(ADDRESS)
    server.faults.break_downloads_after, server.faults.ignore_ranges = None, True
    other.pull(ADDRESS)
    assert same(other.get("trec"), lora(0))


def test_bytes_that_changed_on_the_way_are_refused(server: LoopbackHub, hub: Hub, other: Hub) -> None:
    hub.push("trec@1", ADDRESS)
    server.faults.corrupt = "adapter_model.safetensors"
    with pytest.raises(CorruptAdapterError):
        other.pull(ADDRESS)
    assert other.index() == ()
    assert not list((other.root / ".hub" / "tmp").rglob("*.*"))
    server.faults.corrupt = "graftory-record.json"
    with pytest.raises(CorruptAdapterError):
        other.pull(ADDRESS)
    server.faults.corrupt = None
    other.pull(ADDRESS)


def test_damaged_bytes_are_not_pushed(server: LoopbackHub, hub: Hub) -> None:
    entry = hub.record("trec@1").files[1]
    path = hub._depot.blobs.path(entry.sha256)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptAdapterError, match="not the recorded ones"):
        hub.push("trec@1", ADDRESS)
    assert hub.listing(ADDRESS) == {}


def peft_repo(server: LoopbackHub, hub: Hub, **extra: bytes) -> str:
    return server.put("People/My_LoRA", {**files_of(hub, "trec@1"), "README.md": b"---\nlicense: mit\n---\n", **extra})


def test_a_repository_without_a_record(server: LoopbackHub, hub: Hub, other: Hub) -> None:
    commit = peft_repo(server, hub)
    delivery = other.pull("hf://People/My_LoRA")
    assert str(delivery.ref) == "people/my_lora@1"
    assert delivery.source == f"hf://People/My_LoRA@{commit}"
    record = other.record("people/my_lora")
    assert record.spec.lineage.parameters["source"] == delivery.source
    assert record.spec.licence == "mit"
    assert files_of(other, "people/my_lora") == files_of(hub, "trec@1")
    missing = {gap.field for gap in gaps(record)}
    assert any("tokenizer" in gap for gap in missing)
    assert any("weights" in gap for gap in missing)
    assert str(other.pull("hf://People/My_LoRA", name="mine").ref) == "mine@1"
    assert str(other.pull(f"hf://People/My_LoRA@{commit}").ref) == "people/my_lora@1", "the same again"
    with pytest.raises(RemoteError, match="graftory did not push"):
        other.push("people/my_lora", "hf://People/My_LoRA")


def test_a_pickle_is_not_opened(server: LoopbackHub, hub: Hub, other: Hub) -> None:
    files = files_of(hub, "trec@1")
    server.put("people/old", {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": b"\x80\x04."})
    with pytest.raises(UnsupportedAdapterError, match=r"pickle.*weights_only=True"):
        other.pull("hf://people/old")
    assert not [path for path in server.paths() if path.endswith(".bin")]


@pytest.mark.parametrize("record", [True, False])
def test_what_does_not_fit_the_base_is_not_fetched(
    server: LoopbackHub, hub: Hub, other: Hub, tmp_path: Path, record: bool
) -> None:
    from tests.conftest import tiny_model

    tiny_model("bert").save_pretrained(tmp_path / "base")
    hub.push("trec@1", ADDRESS)
    address = ADDRESS if record else "hf://People/My_LoRA"
    peft_repo(server, hub)
    server.requests.clear()
    with pytest.raises(BaseMismatchError):
        other.pull(address, base=tmp_path / "base")
    whole = [r for r in server.requests if r.path.endswith(".safetensors") and r.method == "GET" and r.range is None]
    assert whole == []
    assert other.index() == ()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("hf://me", "wanted hf://org/repo"),
        ("hf://me/../x", "wanted hf://org/repo"),
        ("hf://me/a/b/c", "wanted hf://org/repo"),
        ("hf://me/nothing", "no such repository"),
        (f"{ADDRESS}@7", "no version 7; there are 1"),
        (f"{ADDRESS}:beta", "no alias 'beta'; there are prod"),
        (f"{ADDRESS}@nowhere", "no such version, branch, tag or commit"),
        (f"{ADDRESS}@sha256:{'0' * 64}", "no version has the digest"),
    ],
)
def test_what_is_not_there(server: LoopbackHub, hub: Hub, other: Hub, address: str, said: str) -> None:
    hub.push("trec@1", ADDRESS)
    with pytest.raises(GraftoryError, match=said) as found:
        other.pull(address)
    assert "\n" not in str(found.value)


def test_a_push_goes_to_a_repository_of_the_name(server: LoopbackHub, hub: Hub) -> None:
    hub.push("trec@1", ADDRESS)
    hub.put("sms", lora(3))
    with pytest.raises(RemoteError, match="holds the versions of 'trec'"):
        hub.push("sms", ADDRESS)
    with pytest.raises(RemoteError, match="not to a version"):
        hub.push("trec@1", f"{ADDRESS}@1")


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_the_token_is_never_said(
    server: LoopbackHub, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int
) -> None:
    """The server echoes it in its answers; it is in no output, no exception with all its causes, no file."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.push("trec@1", ADDRESS)
    server.faults.status = status
    for arguments in (["push", "trec@2", ADDRESS], ["pull", ADDRESS], ["list", ADDRESS]):
        result = CliRunner().invoke(cli, ["--registry", str(hub.root), *arguments])
        assert result.exit_code == 1
        assert result.output.startswith("error: ")
        assert result.output.count("\n") == 1
        assert CANARY not in result.output
        error: BaseException | None = result.exception
        while error is not None:
            assert CANARY not in str(error)
            error = error.__cause__ or error.__context__
    assert any(CANARY in (request.authorization or "") for request in server.requests), "the library used it"
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes()
    for state in server.repos.values():
        assert not [file for tree in state.commits.values() for file in tree.values() if CANARY.encode() in file.data]


def test_no_network(server: LoopbackHub, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(RemoteError, match="check the network"):
        hub.push("trec@1", ADDRESS)


def test_the_commands(server: LoopbackHub, hub: Hub, other: Hub) -> None:
    def run(at: Hub, *arguments: str) -> str:
        result = CliRunner().invoke(cli, ["--registry", str(at.root), *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    assert "pushed to hf://me/trec: trec@1" in run(hub, "push", "trec@1", ADDRESS)
    run(hub, "remote", "add", "origin", ADDRESS)
    run(hub, "push", "trec@2", "origin")
    assert "trec" in run(hub, "list", "origin")
    assert "trec@2" in run(other, "pull", ADDRESS)
    assert json.loads(run(other, "pull", f"{ADDRESS}:prod", "--json"))["ref"] == "trec@1"
