"""Ends a command of the hub at every file operation in turn, and looks at what is left.

The command runs in a forked child that watches its own file operations: opening for writing, rename, link, remove,
mkdir, rmdir (by an audit hook) and fsync. Before the N-th of them the child ends, N = 1, 2, ... until a run comes to
its end, and leaves a copy of its files for each of several crashes at that moment. Two models of a crash:

- `kill`: the process ends, the machine lives: what was done is there.
- `power`: the machine ends too. POSIX promises only this: the bytes of a file survive an fsync of it, the names in a
  folder an fsync of the folder. So each file that was written and not synced since is torn (cut in half, or zeros in
  place of its bytes), and the names that were made, moved or removed in folders not synced since are undone: all of
  them, or some, drawn by a fixed seed; or both.

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
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone, tzinfo
from pathlib import Path
from typing import Any, TypeVar

from graftory.hub import Hub, depot, records, signing, store
from graftory.hub.depot import Depot
from graftory.hub.index import index_bytes, make_index
from graftory.hub.keys import load_private_key
from graftory.hub.locate import is_hub
from graftory.hub.named import add_remote, remotes, remove_remote

CRASHED = 137
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
STARTED = time.time()


@dataclass(frozen=True)
class Damage:
    """What a power cut does.

    Attributes:
        torn: What files that were not synced are then; None if they are whole.
        undone: How likely each name that was not synced is undone.
    """

    torn: str | None = None
    undone: float = 0.0


DAMAGES: Mapping[str, Damage] = {
    "kill": Damage(),
    "cut": Damage(torn="cut"),
    "zeros": Damage(torn="zeros"),
    "undone": Damage(undone=1.0),
    "some, cut": Damage(torn="cut", undone=0.5),
    "some, zeros": Damage(torn="zeros", undone=0.5),
}
"""A kill, and five power cuts."""


class Frozen(datetime):
    """A clock that stands, so that two runs write the same bytes."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Frozen:
        del tz
        return cls(2026, 1, 1, tzinfo=timezone.utc)


# --- the child: watch, crash, damage ---------------------------------------------------------------------------------


@dataclass
class Watch:
    """What a child has done to files below a folder, and when it is to end.

    Attributes:
        root: The folder.
        stop_at: The operation before which it ends.
        left: Where the files then go, a folder for each damage that changes them and one for the kill, by name.
        torn: Files whose bytes are not durable.
        undo: For each folder what takes back its changes since its last fsync, oldest first, in a copy of the root.
    """

    root: str
    stop_at: int
    left: Path
    count: int = 0
    torn: set[str] = field(default_factory=set)
    undo: list[tuple[str, Callable[[str], None]]] = field(default_factory=list)
    crashing: bool = False

    def mine(self, path: object) -> str | None:
        """The path, if it is below the folder."""
        if not isinstance(path, str | os.PathLike):
            return None
        text = os.path.realpath(os.path.dirname(os.path.abspath(path))) + os.sep + os.path.basename(path)
        return text if text.startswith(self.root + os.sep) else None

    def tick(self) -> None:
        """One more operation is about to happen."""
        self.count += 1
        if self.count == self.stop_at:
            self.crash()

    def crash(self) -> None:
        """End as the models say."""
        self.crashing = True
        for name, model in DAMAGES.items():
            if name == "kill" or (model.torn and self.torn) or (model.undone and self.undo):
                copy_tree(self.root, str(self.left / name))
                self.damage(str(self.left / name), name)
        os._exit(CRASHED)

    def damage(self, root: str, name: str) -> None:
        """Do to a copy of the files what a damage does."""
        model = DAMAGES[name]
        for path in self.torn if model.torn else ():
            tear(root + path, zeros=model.torn == "zeros")
        chosen = random.Random(name + str(self.stop_at))
        for _, back in reversed(self.undo):
            if chosen.random() < model.undone:
                back(root)

    def within(self, path: str) -> str:
        """The path from the root on, with a slash before it."""
        return path[len(self.root) :]

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self.crashing or event not in EVENTS:
            return
        EVENTS[event](self, args)

    def opened(self, args: tuple[Any, ...]) -> None:
        path = self.mine(args[0])
        flags = args[2] if isinstance(args[2], int) else 0
        if path is None or not flags & WRITING:
            return
        self.tick()
        short = self.within(path)
        if not os.path.exists(path):
            self.undo.append((os.path.dirname(path), lambda root: remove(root + short)))
        if not path.endswith("lock"):
            self.torn.add(short)

    def renamed(self, args: tuple[Any, ...]) -> None:
        source, target = self.mine(args[0]), self.mine(args[1])
        if source is None or target is None:
            return
        self.tick()
        before = content(target)
        old, new = self.within(source), self.within(target)

        def back(root: str) -> None:
            if os.path.exists(root + new):
                os.replace(root + new, root + old)
            if before is not None:
                write(root + new, before)

        self.undo.append((os.path.dirname(target), back))
        if old in self.torn:
            self.torn.add(new)

    def linked(self, args: tuple[Any, ...]) -> None:
        source, target = self.mine(args[0]), self.mine(args[1])
        if source is None or target is None:
            return
        self.tick()
        old, new = self.within(source), self.within(target)
        if not os.path.exists(target):
            self.undo.append((os.path.dirname(target), lambda root: remove(root + new)))
            if old in self.torn:
                self.torn.add(new)

    def removed(self, args: tuple[Any, ...]) -> None:
        path = self.mine(args[0])
        if path is None:
            return
        self.tick()
        before, short = content(path), self.within(path)
        if before is not None:
            self.undo.append((os.path.dirname(path), lambda root: write(root + short, before)))

    def made(self, args: tuple[Any, ...]) -> None:
        path = self.mine(args[0])
        if path is None:
            return
        self.tick()
        short = self.within(path)
        if not os.path.exists(path):
            self.undo.append((os.path.dirname(path), lambda root: shutil.rmtree(root + short, ignore_errors=True)))

    def unmade(self, args: tuple[Any, ...]) -> None:
        path = self.mine(args[0])
        if path is None:
            return
        self.tick()
        short = self.within(path)
        self.undo.append((os.path.dirname(path), lambda root: os.makedirs(root + short, exist_ok=True)))

    def synced(self, handle: int) -> None:
        path = self.mine(os.readlink(f"/proc/self/fd/{handle}"))
        if path is None and os.readlink(f"/proc/self/fd/{handle}") != self.root:
            return
        self.tick()
        path = path or self.root
        if os.path.isdir(path):
            self.undo = [(folder, back) for folder, back in self.undo if folder != path]
        else:
            inode = os.fstat(handle).st_ino
            here = {each: self.root + each for each in self.torn}
            self.torn = {each for each, path in here.items() if os.path.exists(path) and os.stat(path).st_ino != inode}


EVENTS: Mapping[str, Callable[[Watch, tuple[Any, ...]], None]] = {
    "open": Watch.opened,
    "os.rename": Watch.renamed,
    "os.link": Watch.linked,
    "os.remove": Watch.removed,
    "os.mkdir": Watch.made,
    "os.rmdir": Watch.unmade,
}


def content(path: str) -> bytes | None:
    """The bytes of a file, if it is there."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return file.read()


def write(path: str, data: bytes) -> None:
    if os.path.isdir(os.path.dirname(path)):
        with open(path, "wb") as file:
            file.write(data)


def remove(path: str) -> None:
    if os.path.isfile(path):
        os.unlink(path)


def tear(path: str, *, zeros: bool) -> None:
    """What a file may be whose bytes did not reach the disk."""
    data = content(path)
    if data is not None:
        with open(path, "r+b") as file:  # in place: it may have a second name
            if zeros:
                file.write(b"\0" * len(data))
            else:
                file.truncate(len(data) // 2)


def copy_tree(source: str, target: str) -> None:
    """Copy a tree in which a file may have several names; `shutil.copytree` makes them several files, and is slow."""
    names: dict[int, str] = {}
    for folder, _, files in os.walk(source):
        there = target + folder[len(source) :]
        os.mkdir(there)
        for name in files:
            path, to = os.path.join(folder, name), os.path.join(there, name)
            info = os.stat(path)
            if info.st_ino in names:
                os.link(names[info.st_ino], to)
                continue
            names[info.st_ino] = to
            with open(path, "rb") as file, open(to, "wb") as copy:
                copy.write(file.read())
            os.chmod(to, info.st_mode)
            os.utime(to, ns=(info.st_atime_ns, info.st_mtime_ns))


def run_and_crash(root: Path, command: Callable[[], object], stop_at: int, left: Path, mutate: str | None) -> int:
    """Run a command in a child that ends before its N-th operation; returns the exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        watch = Watch(os.path.realpath(root), stop_at, left)
        really = os.fsync

        def fsync(handle: int) -> None:
            if not watch.crashing:
                watch.synced(handle)
            really(handle)

        os.fsync = fsync  # type: ignore[assignment]
        if mutate is not None:
            MUTATIONS[mutate]()
        sys.addaudithook(watch.audit)
        command()
        watch.crashing = True  # nothing is watched any more
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


# --- mutations: mistakes that must be found --------------------------------------------------------------------------


def _no_sync(of_folders: bool) -> Callable[[], None]:
    def mutate() -> None:
        tracked = os.fsync

        def fsync(handle: int) -> None:
            if os.path.isdir(f"/proc/self/fd/{handle}") != of_folders:
                tracked(handle)

        os.fsync = fsync  # type: ignore[assignment]

    return mutate


def _record_before_blobs() -> None:
    late: list[bytes] = []
    real_write, real_commit = store.BlobStore.write, depot.Depot._commit

    def commit(self: Depot, record: records.Record) -> None:
        real_commit(self, record)
        for data in late:
            real_write(self.blobs, data)

    store.BlobStore.write = lambda self, data: late.append(data) or ""  # type: ignore[func-returns-value,method-assign]
    depot.Depot._commit = commit  # type: ignore[method-assign]


def _no_pending_note() -> None:
    depot.pending.write = lambda path, names, scratch: None  # type: ignore[attr-defined]


def _records_in_place() -> None:
    def create(path: Path, data: bytes, scratch: Path) -> None:
        del scratch
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            os.fsync(file.fileno())
            file.write(data[len(data) // 2 :])

    records.create_exclusive = create  # type: ignore[attr-defined]


MUTATIONS: Mapping[str, Callable[[], None]] = {
    "files are not synced": _no_sync(of_folders=False),
    "folders are not synced": _no_sync(of_folders=True),
    "the record comes before its files": _record_before_blobs,
    "no note of pending rows": _no_pending_note,
    "records are written in place": _records_in_place,
}


# --- what is looked at -----------------------------------------------------------------------------------------------


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
            path = os.path.join(folder, name)
            info = os.stat(path)
            first = names.setdefault(info.st_ino, path[len(str(root)) :])
            old = info.st_mtime < STARTED - 3600
            digest.update(f"file {name}\0{first}\0{info.st_mode} {info.st_size} {old} ".encode())
            with open(path, "rb") as file:
                digest.update(file.read())
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
                os.rename(left / damage, work)
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
