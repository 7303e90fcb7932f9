"""Bad input through the real doors: a typed error in one line, nothing changed, the rest of the hub works."""

from __future__ import annotations

import json
import re
import shutil
import signal
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest
from click.testing import CliRunner

from graftory.cli import cli
from graftory.errors import CorruptAdapterError, GraftoryError
from graftory.hub import Hub
from graftory.hub.depot import Depot
from graftory.hub.keys import create_key, load_private_key, load_public_key
from graftory.hub.named import add_remote, remotes
from graftory.hub.signing import sign, verify_signed
from tests.bad_hubs import BAD_INPUTS
from tests.bad_inputs import CONFIG, GOOD_CONFIG, GOOD_WEIGHTS, ROWS, TRAP, WEIGHTS, Bad, Place, entry, safetensors
from tests.hub_samples import bottleneck, lora, snapshot

SECONDS = 10
"""Longest that any bad input may take; it is a hang otherwise."""


@dataclass(frozen=True)
class Door:
    """A way in: from Python, and from the command line where there is one."""

    call: Callable[[Place, str], object]
    argv: Callable[[Place, str], list[str]] | None = None
    own: bool = True
    """Whether it is the user's hub that the command works in; the stranger's otherwise."""


def _hub(place: Place) -> Hub:
    return Hub.open(place.hub)


def _theirs(place: Place) -> Hub:
    return Hub.open(place.remote)


def _verified(place: Place, value: str) -> None:
    """`verify` tells everything instead of raising; it is raised here, so that this door is like the others."""
    report = _theirs(place).verify()
    if not report.ok:
        raise CorruptAdapterError("; ".join(f"{item.where}: {item.what}; {item.remedy}" for item in report.problems))


def _signed(place: Place, value: str) -> object:
    return verify_signed(Depot(place.remote), "trec@1", [load_public_key(place.root / "key.pub")])


def _sign(place: Place, value: str) -> object:
    return load_private_key(place.root / "key")


DOORS: Mapping[str, Door] = {
    "add": Door(
        lambda place, value: _hub(place).add(place.folder, name="theirs"),
        lambda place, value: ["add", str(place.folder), "--name", "theirs"],
    ),
    "add whole": Door(
        lambda place, value: _hub(place).add(place.whole, name="theirs"),
        lambda place, value: ["add", str(place.whole), "--name", "theirs"],
    ),
    "add as mine": Door(
        lambda place, value: _hub(place).add(place.folder, name="mine", version=1),
        lambda place, value: ["add", str(place.folder), "--name", "mine", "--version", "1"],
    ),
    "fits": Door(
        lambda place, value: _hub(place).add(place.folder, name="theirs", fits=place.base),
        lambda place, value: ["add", str(place.folder), "--name", "theirs", "--fits", str(place.base)],
    ),
    "pull": Door(
        lambda place, value: _hub(place).pull(f"{place.remote.as_uri()}/trec@1"),
        lambda place, value: ["pull", f"{place.remote.as_uri()}/trec@1"],
    ),
    "pull neck": Door(
        lambda place, value: _hub(place).pull(f"{place.remote.as_uri()}/neck"),
        lambda place, value: ["pull", f"{place.remote.as_uri()}/neck"],
    ),
    "pull conflict": Door(lambda place, value: _theirs(place).pull(f"{place.twin.as_uri()}/trec@1"), own=False),
    "push conflict": Door(lambda place, value: _theirs(place).push("trec@1", place.twin.as_uri()), own=False),
    "push": Door(
        lambda place, value: _theirs(place).push("trec@1", (place.root / "new").as_uri()),
        lambda place, value: ["push", "trec@1", (place.root / "new").as_uri()],
        own=False,
    ),
    "get": Door(lambda place, value: _theirs(place).get("trec@1"), own=False),
    "record": Door(
        lambda place, value: _theirs(place).record("trec@1"), lambda place, value: ["show", "trec@1"], own=False
    ),
    "index": Door(lambda place, value: _theirs(place).index(), lambda place, value: ["list"], own=False),
    "aliases": Door(
        lambda place, value: _theirs(place).aliases("trec"), lambda place, value: ["alias", "trec"], own=False
    ),
    "remotes": Door(
        lambda place, value: remotes(Depot(place.remote)), lambda place, value: ["remote", "list"], own=False
    ),
    "verify": Door(_verified, lambda place, value: ["verify"], own=False),
    "name": Door(
        lambda place, value: _hub(place).add(place.folder, name=value),
        lambda place, value: ["add", str(place.folder), f"--name={value}"],
    ),
    "reference": Door(
        lambda place, value: _theirs(place).record(value), lambda place, value: ["show", "--", value], own=False
    ),
    "address": Door(lambda place, value: _hub(place).pull(value), lambda place, value: ["pull", "--", value]),
    "push to": Door(
        lambda place, value: _hub(place).push("mine", value), lambda place, value: ["push", "--", "mine", value]
    ),
    "new remote": Door(
        lambda place, value: add_remote(Depot(place.hub), "x", value),
        lambda place, value: ["remote", "add", "x", value],
    ),
    "public key": Door(
        _signed, lambda place, value: ["verify", "trec@1", "--key", str(place.root / "key.pub")], own=False
    ),
    "public key file": Door(_signed, own=False),
    "private key": Door(_sign, lambda place, value: ["sign", "trec@1", "--key", str(place.root / "key")], own=False),
    "signed": Door(_signed, own=False),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place where everything is good."""
    place = Place(tmp_path_factory.mktemp("template"))
    Hub.create(place.hub).put("mine", bottleneck(1))
    strangers = Hub.create(place.remote)
    strangers.put("trec", lora(2))
    strangers.put("neck", bottleneck())
    strangers.put("other", bottleneck(3))
    strangers.set_alias("trec", "prod", 1)
    strangers.materialize("trec", place.whole)
    public = create_key(place.root / "key")
    sign(Depot(place.remote), "trec@1", load_private_key(place.root / "key"))
    assert public == load_public_key(place.root / "key.pub")
    for folder in (place.folder, place.base):
        folder.mkdir()
    (place.folder / CONFIG).write_text(json.dumps(GOOD_CONFIG))
    (place.folder / WEIGHTS).write_bytes(GOOD_WEIGHTS)
    (place.base / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 3}))
    base = safetensors({"l.q.weight": entry(0, 60, "F32", [5, 3])}, b"\0" * 60)
    (place.base / "model.safetensors").write_bytes(base)
    shutil.copytree(place.remote, place.twin)
    return place


@pytest.fixture
def place(template: Place, tmp_path: Path) -> Place:
    """A copy of the good place."""
    shutil.copytree(template.root, tmp_path / "place")
    return Place(tmp_path / "place")


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """End whatever takes too long."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"more than {SECONDS} seconds")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def seen(place: Place) -> dict[str, bytes]:
    """Every file of both hubs but what waits for the rest of a download, blobs by their names."""
    files = {**snapshot(place.hub), **{f"theirs/{name}": data for name, data in snapshot(place.remote).items()}}
    blobs = (path for hub in (place.hub, place.remote) for path in (hub / ".hub" / "blobs").rglob("*"))
    kept = {name: data for name, data in files.items() if ".hub/tmp/partial/" not in name}
    return kept | {str(path): b"" for path in blobs if path.is_file()}


CASES = [(bad, door) for bad in BAD_INPUTS for door in bad.doors]
WORDS = {"verify", "address", "push to", "reference", "name"}


def refuse(place: Place, bad: Bad, door: Door, words: bool) -> None:
    with pytest.raises(GraftoryError) as caught:
        door.call(place, bad.value)
    message = " ".join(str(caught.value).split())
    assert isinstance(caught.value, bad.error), caught.value
    assert message == str(caught.value), "not one line"
    assert len(message) < 1000
    assert message.isprintable()
    assert not words or re.search(bad.text, message), message


@pytest.mark.parametrize(("bad", "name"), CASES, ids=[f"{bad.id} | {door}" for bad, door in CASES])
def test_refused(bad: Bad, name: str, place: Place) -> None:
    bad.make(place)
    before = seen(place)
    refuse(place, bad, DOORS[name], name != "verify")
    assert seen(place) == before
    if DOORS[name].argv is not None:
        check_command(place, bad, name)
        assert seen(place) == before
    assert not (place.root / TRAP).exists()
    assert Hub.open(place.hub).get("mine@1").spec == bottleneck(1).spec
    assert Hub.open(place.remote).get("other").spec == bottleneck(3).spec


def check_command(place: Place, bad: Bad, name: str) -> None:
    """The same from the command line: no traceback, one line that says `error:`."""
    door = DOORS[name]
    assert door.argv is not None
    arguments = ["--registry", str(place.hub if door.own else place.remote), *door.argv(place, bad.value)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.count("\n") == 1
    if name not in {"verify", "public key"}:
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")


def test_there_are_enough_of_every_row() -> None:
    counted = Counter(bad.row for bad in BAD_INPUTS)
    assert set(counted) == set(ROWS)
    assert len(BAD_INPUTS) >= 800


def test_the_good_place_is_good(place: Place) -> None:
    """Nothing is refused for another reason than what was made bad."""
    hub = Hub.open(place.hub)
    assert str(hub.add(place.folder, name="a", fits=place.base)) == "a@1"
    assert str(hub.add(place.whole, name="b")) == "b@1"
    for name in ("trec@1", "neck", "other"):
        hub.pull(f"{place.remote.as_uri()}/{name}")
    assert hub.verify().ok
    assert Hub.open(place.remote).verify().ok
    assert verify_signed(Depot(place.remote), "trec@1", [load_public_key(place.root / "key.pub")])


HUGE = [bad for bad in BAD_INPUTS if bad.id in {"header: 67 MB header", "header: a million keys"}]


@pytest.mark.parametrize("door", ["add", "pull"])
@pytest.mark.parametrize("bad", HUGE, ids=[bad.id for bad in HUGE])
def test_a_huge_header_takes_no_memory(bad: Bad, door: str, place: Place) -> None:
    bad.make(place)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptAdapterError, match="at most 1048576"):
            DOORS[door].call(place, "")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
