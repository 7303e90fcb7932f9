"""What a command that ends at any of its file operations (`crash_watch`) leaves of a hub, and what must be true of it.

After each crash, in the process that watches:

1. what readers see is the state before or the state after the command, or, where a command brings several versions,
   some of the versions of the state after, each whole and with the parents it needs (G2, G3);
2. `verify` finds nothing wrong (G7 too: the index is what the records make);
3. the same command succeeds and gives the state after;
4. `gc` then leaves the very files of a hub where nothing ever went wrong (G3).

Many crashes leave the very same files: what was found about a tree is kept, and looked up when it comes again.

Run as a program, so that no thread of a test is forked: `python -m tests.crash_points FIXTURES SCENARIO [MUTATION]`
prints the counts as JSON, and what went wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from graftory.hub import Hub, depot, records, signing
from graftory.hub.depot import Depot
from graftory.hub.index import index_bytes, make_index
from graftory.hub.keys import load_private_key
from graftory.hub.locate import is_hub
from graftory.hub.named import add_remote, remotes, remove_remote
from tests.crash_watch import CRASHED, DAMAGES, STARTED, Frozen, copy_tree, run_and_crash

State = dict[str, Any]


def state_of(root: Path) -> State | None:
    """Everything that a reader can see of a hub, every byte hashed; None if there is none.

    Raises:
        GraftoryError: If something that is referred to is not whole.
    """
    if not is_hub(root):
        return None
    hub, here = Hub(root), Depot(root)
    versions = {}
    for row in hub.index():
        for version in hub.versions(row.name):
            record = hub.record(f"{row.name}@{version}")
            for entry in record.files:
                here.blobs.map(entry.sha256, entry.path)
            for parent in record.spec.lineage.parents:
                if parent.relation == "composed" and here.records.find(parent.digest) is None:
                    raise AssertionError(f"{record.ref} lacks its parent {parent.ref}")
            versions[str(record.ref)] = record.source
    if index_bytes(hub.index()) != index_bytes(make_index(here.records, here.aliases)):
        raise AssertionError("the rows are not what the records make")
    names = [row.name for row in hub.index()]
    return {
        "versions": versions,
        "aliases": {f"{name}:{alias}": version for name in names for alias, version in hub.aliases(name).items()},
        "signatures": {ref: here.signatures.of(ref.split("@")[0], int(ref.split("@")[1])) for ref in versions},
        "remotes": dict(remotes(here)),
    }


def between(seen: State | None, before: State | None, after: State | None) -> bool:
    """Whether each part of a state is as before or as after; so a command may bring several versions, one by one."""
    empty: State = {part: {} for part in ("versions", "aliases", "signatures", "remotes")}
    old, now, new = before or empty, seen or empty, after or empty
    for part, values in now.items():
        for key, value in values.items():
            if part == "signatures":
                known = {**old[part].get(key, {}), **new[part].get(key, {})}
                fits = value.items() <= known.items()
            else:
                fits = value in (old[part].get(key), new[part].get(key))
            if not fits:
                return False
    kept = {key for key in old["versions"] if key in new["versions"]}
    return kept <= set(now["versions"])


def tree_of(root: Path) -> dict[str, bytes]:
    """Every file of a hub but its lock."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def fingerprint(root: Path) -> str:
    """The same for two trees only if no command can tell them apart: the folders, the bytes and the mode of each file,
    which files are one file with two names, which are old (`gc` keeps young ones).
    """
    digest, names = hashlib.sha256(), dict[int, str]()
    for folder, folders, files in os.walk(root):
        folders.sort()
        digest.update(f"folder {folder[len(str(root)) :]}\0".encode())
        for name in sorted(files):
            path = Path(folder, name)
            info = path.stat()
            first = names.setdefault(info.st_ino, str(path.relative_to(root)))
            old = info.st_mtime < STARTED - 3600
            digest.update(f"file {name}\0{first}\0{info.st_mode} {info.st_size} {old} ".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def problem_of(root: Path) -> str:
    """The first that `verify` finds wrong with a hub; empty if nothing is."""
    problems = Hub(root).verify().problems
    return str(problems[0]) if problems else ""


def cleaned(root: Path) -> dict[str, bytes]:
    """What `gc` leaves of a hub."""
    Hub(root).gc(partial_downloads=True)
    return tree_of(root)


T = TypeVar("T")


class Looked:
    """What was found in trees, each looked at once."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, str, str], Any] = {}

    def at(self, look: Callable[[Path], T], root: Path) -> T:
        """What a function finds in a tree."""
        key = (look, root.name, fingerprint(root))
        if key not in self._found:
            self._found[key] = look(root)
        found: T = self._found[key]
        return found


# --- the scenarios ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A command of the hub.

    Attributes:
        prepare: Makes, in an empty folder, the hubs as they are before.
        command: The command, run in that folder.
        hubs: The folders of the hubs that it may change.
        atomic: Whether only the states before and after may be seen.
    """

    prepare: Callable[[Path, Path], None]
    command: Callable[[Path, Path], object]
    hubs: tuple[str, ...] = ("hub",)
    atomic: bool = True


def _nothing(work: Path, fixtures: Path) -> None:
    del work, fixtures


def _empty(work: Path, fixtures: Path) -> None:
    del fixtures
    Hub.create(work / "hub")


def _filled(work: Path, fixtures: Path) -> None:
    shutil.copytree(fixtures / "hub", work / "hub")


def _two(work: Path, fixtures: Path) -> None:
    _filled(work, fixtures)
    shutil.copytree(fixtures / "other", work / "other")


def _littered(work: Path, fixtures: Path) -> None:
    _filled(work, fixtures)
    here = Depot(work / "hub")
    for number in range(3):
        here.blobs.write(b"nobody's %d" % number)
        (here.tmp / f"scratch{number}").write_bytes(b"half")
    here.staging.home.mkdir(parents=True, exist_ok=True)
    here.staging.path("e" * 64).write_bytes(b"half a file")
    os.utime(here.staging.path("e" * 64), (0, 0))
    here.signatures.add("gone", 1, "ab" * 16, b"{}")


def _wrong_index(work: Path, fixtures: Path) -> None:
    _filled(work, fixtures)
    path = work / "hub" / "registry.json"
    path.write_bytes(path.read_bytes().replace(b'"version": 2', b'"version": 1'))


def _named(work: Path, fixtures: Path) -> None:
    _filled(work, fixtures)
    add_remote(Depot(work / "hub"), "origin", "file:///somewhere")


def _hub(work: Path, name: str = "hub") -> Hub:
    return Hub(work / name)


SCENARIOS: Mapping[str, Scenario] = {
    "init": Scenario(_nothing, lambda work, _: Hub.create(work / "hub")),
    "add the first": Scenario(_empty, lambda work, fixtures: _hub(work).add(fixtures / "a", name="org/x")),
    "add the next": Scenario(_filled, lambda work, fixtures: _hub(work).add(fixtures / "c", name="a")),
    "add the same": Scenario(_filled, lambda work, fixtures: _hub(work).add(fixtures / "b", name="a")),
    "alias, new": Scenario(_filled, lambda work, _: _hub(work).set_alias("a", "next", 2)),
    "alias, moved": Scenario(_filled, lambda work, _: _hub(work).set_alias("a", "prod", 2)),
    "push to a new hub": Scenario(
        _filled,
        lambda work, _: _hub(work).push("both", (work / "new").as_uri()),
        hubs=("hub", "new"),
        atomic=False,
    ),
    "push to a hub": Scenario(
        _two,
        lambda work, _: _hub(work).push("both", (work / "other").as_uri(), move_aliases=True),
        hubs=("hub", "other"),
        atomic=False,
    ),
    "pull": Scenario(
        _two,
        lambda work, _: _hub(work, "other").pull(f"{(work / 'hub').as_uri()}/both", move_aliases=True),
        hubs=("hub", "other"),
        atomic=False,
    ),
    "pull one": Scenario(
        _two, lambda work, _: _hub(work, "other").pull(f"{(work / 'hub').as_uri()}/b"), hubs=("hub", "other")
    ),
    "gc": Scenario(_littered, lambda work, _: _hub(work).gc()),
    "verify --rebuild": Scenario(_wrong_index, lambda work, _: _hub(work).rebuild_index()),
    "sign": Scenario(_filled, lambda work, fixtures: _hub(work).sign("a@1", load_private_key(fixtures / "key"))),
    "remote add": Scenario(_filled, lambda work, _: add_remote(Depot(work / "hub"), "origin", "file:///somewhere")),
    "remote remove": Scenario(_named, lambda work, _: _forget(Depot(work / "hub"))),
}
"""Every command that writes to a hub."""


def _forget(here: Depot) -> None:
    """Remove the name; a repeat after a crash may find it gone."""
    if "origin" in remotes(here):
        remove_remote(here, "origin")


@dataclass
class Count:
    """What a scenario came to."""

    operations: int = 0
    points: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Expected:
    """What a command does when nothing goes wrong.

    Attributes:
        before: The state of each hub before; nothing if there is nothing to see yet.
        after: The one after.
        trees: What `gc` then leaves of each.
    """

    before: Mapping[str, State | None]
    after: Mapping[str, State | None]
    trees: Mapping[str, dict[str, bytes]]


def enumerate_points(name: str, fixtures: Path, scratch: Path, mutate: str | None = None) -> Count:
    """Crash a command at every operation, in every way."""
    scenario, count = SCENARIOS[name], Count()
    origin, done, work, left = (scratch / each for each in ("origin", "done", "work", "left"))
    origin.mkdir()
    scenario.prepare(origin, fixtures)
    before = {} if name == "verify --rebuild" else {hub: state_of(origin / hub) for hub in scenario.hubs}
    copy_tree(str(origin), str(done))
    scenario.command(done, fixtures)
    after = {hub: state_of(done / hub) for hub in scenario.hubs}
    expected = Expected(before, after, {hub: cleaned(done / hub) for hub in scenario.hubs})
    problems: dict[str, str] = {}
    looked = Looked()
    for stop_at in range(1, 10_000):
        copy_tree(str(origin), str(work))
        left.mkdir()
        code = run_and_crash(work, lambda: scenario.command(work, fixtures), stop_at, left, mutate)
        shutil.rmtree(work)
        if code == 0:
            count.operations = stop_at - 1
            return count
        prints = {path.name: fingerprint(path) for path in left.iterdir()}
        for damage in DAMAGES:
            count.points += 1
            print_of = prints.get(damage, prints.get("kill", ""))
            if code == CRASHED and print_of not in problems:
                (left / damage).rename(work)
                problems[print_of] = _problem(scenario, fixtures, work, expected, looked)
                shutil.rmtree(work)
            problem = problems[print_of] if code == CRASHED else f"the command ended with {code}"
            if problem:
                count.wrong.append(f"{name}, {damage}, operation {stop_at}: {problem}")
        shutil.rmtree(left)
        if mutate is not None and count.wrong:
            return count
    raise AssertionError(f"{name} does not come to its end")


def _problem(scenario: Scenario, fixtures: Path, work: Path, expected: Expected, looked: Looked) -> str:
    """What is wrong with what a crash left; empty if nothing is."""
    try:
        _check(scenario, fixtures, work, expected, looked)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _check(scenario: Scenario, fixtures: Path, work: Path, expected: Expected, looked: Looked) -> None:
    for hub, before in expected.before.items():
        seen, after = looked.at(state_of, work / hub), expected.after[hub]
        if scenario.atomic and seen not in (before, after):
            raise AssertionError(f"{hub}: neither the state before nor the one after")
        if not between(seen, before, after):
            raise AssertionError(f"{hub}: a mixture")
        if seen is not None and (problem := looked.at(problem_of, work / hub)):
            raise AssertionError(f"{hub}: {problem}")
    scenario.command(work, fixtures)
    if {hub: looked.at(state_of, work / hub) for hub in scenario.hubs} != expected.after:
        raise AssertionError("repeated, it gives another state")
    for hub in scenario.hubs:
        left = looked.at(cleaned, work / hub).items() ^ expected.trees[hub].items()
        if left:
            raise AssertionError(f"{hub}: gc leaves {sorted(path for path, _ in left)[0]}")


def _scratch() -> Iterator[Path]:
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=home) as folder:
        yield Path(folder)


def _remember_records() -> None:
    """Parse each record once: the same few are read a hundred thousand times here."""
    real = records.record_from_bytes
    known: dict[bytes, records.Record] = {}

    def remembered(data: bytes, where: str) -> records.Record:
        if data not in known:
            known[data] = real(data, where)
        return known[data]

    records.record_from_bytes = remembered


def main(fixtures: str, name: str, mutate: str | None = None) -> None:
    _remember_records()
    for module in (depot, records, signing):
        module.datetime = Frozen  # type: ignore[attr-defined]
    for scratch in _scratch():
        count = enumerate_points(name, Path(fixtures), scratch, mutate)
        print(json.dumps({"operations": count.operations, "points": count.points, "wrong": count.wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
