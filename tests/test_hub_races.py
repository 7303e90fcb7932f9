"""Processes at one hub at one time: what G1, G3, G5 and G7 promise, in races between real processes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from graftory.hub import Hub
from graftory.hub.depot import Depot
from tests import racers
from tests.hub_samples import lora, same


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters as folders, so that the processes need no torch."""
    home = tmp_path_factory.mktemp("folders")
    hub = Hub.create(home / "hub")
    return [hub.materialize(hub.put("x", lora(seed)), home / str(seed)) for seed in range(12)]


@pytest.mark.parametrize(("kind", "count", "rounds"), [("push", 2, 20), ("add", 2, 10), ("push", 8, 2)])
def test_of_several_writers_of_a_version_one_wins(
    folders: list[Path], tmp_path: Path, kind: str, count: int, rounds: int
) -> None:
    there = Hub.create(tmp_path / "there")
    roots = [Hub.create(tmp_path / str(number)).root for number in range(count)]
    outcomes = racers.race(
        *[(racers.push_rounds, root, folders[number], there.root, rounds, kind) for number, root in enumerate(roots)]
    )
    for version, results in enumerate(zip(*outcomes, strict=True), start=1):
        assert Counter(results) == {"won": 1, "conflict": count - 1}, version
        assert same(there.get(f"x@{version}"), lora(results.index("won"))), "what is there is the winner's"
    assert there.versions("x") == tuple(range(1, rounds + 1))
    assert there.verify().ok
    if kind == "push":  # a loser takes the next number and gets through
        Hub(roots[0]).add(folders[0], name="x", version=rounds + 1)
        assert Hub(roots[0]).push(f"x@{rounds + 1}", there.root.as_uri()).ref.version == rounds + 1


def test_gc_takes_nothing_that_others_need(folders: list[Path], tmp_path: Path) -> None:
    source, hub = Hub.create(tmp_path / "source"), Hub.create(tmp_path / "hub")
    for number, folder in enumerate(folders):
        source.add(folder, name=f"s{number}")
    ended = racers.SPAWN.Event()
    kept, (rounds, removed) = racers.race(
        (racers.then, ended, racers.keep_all, hub.root, folders, source.root.as_uri(), "org"),
        (racers.collect_until, hub.root, ended),
    )
    assert kept == len(folders)
    assert rounds > len(folders), "it collected all the while"
    assert removed == []
    report = hub.verify()
    assert (report.versions, report.problems, report.leftovers) == (2 * len(folders), (), ())
    for number in range(len(folders)):
        assert same(hub.get(f"s{number}"), lora(number))
        assert same(hub.get(f"org/n{number}"), lora(number))


def test_two_pulls_of_one_version(folders: list[Path], tmp_path: Path) -> None:
    source, hub = Hub.create(tmp_path / "source"), Hub.create(tmp_path / "hub")
    digest = source.record(source.add(folders[3], name="x")).digest
    address = f"{source.root.as_uri()}/x"
    assert racers.race(*[(racers.pull, hub.root, address)] * 4) == [digest] * 4
    assert same(hub.get("x"), lora(3))
    report = hub.verify()
    assert (report.problems, report.leftovers) == ((), ())
    assert hub.gc(partial_downloads=True).removed == (), "and nothing is left over"


def test_every_move_of_an_alias_is_in_the_log(folders: list[Path], tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    for folder in folders[:3]:
        hub.add(folder, name="x")
    moves = [1, 2, 3] * 5
    counts = racers.race(*[(racers.move_alias, hub.root, f"a{number}", moves) for number in range(4)])
    assert counts == [len(moves)] * 4
    log = Depot(hub.root).aliases.log("x")
    assert len(log) == 4 * len(moves)
    for number in range(4):
        assert [move.version for move in log if move.alias == f"a{number}"] == moves
    assert hub.aliases("x") == {f"a{number}": 3 for number in range(4)}
    assert hub.verify().ok


def test_readers_see_what_the_records_say(folders: list[Path], tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    hub.add(folders[0], name="x")
    ended = racers.SPAWN.Event()
    written, (looks, wrong) = racers.race(
        (racers.then, ended, racers.write_versions, hub.root, folders[1:]), (racers.watch, hub.root, ended)
    )
    assert written == len(folders) - 1
    assert wrong == []
    assert looks > 5
    assert hub.verify().ok
