"""Ends a command of the hub at every file operation in turn, and leaves what a crash there would leave.

The command runs in a forked child that watches its own file operations: opening for writing, rename, link, remove,
mkdir, rmdir (by an audit hook) and fsync. Before the N-th of them the child ends, N = 1, 2, ... until a run comes to
its end, and leaves a copy of its files for each of several crashes at that moment. Two models of a crash:

- `kill`: the process ends, the machine lives: what was done is there.
- `power`: the machine ends too. POSIX promises only this: the bytes of a file survive an fsync of it, the names in a
  folder an fsync of the folder. So each file that was written and not synced since is torn (cut in half, or zeros in
  place of its bytes), and the names that were made, moved or removed in folders not synced since are undone: all of
  them, or some, drawn by a fixed seed; or both.

What must be true of what is left is in `crash_points`.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone, tzinfo
from pathlib import Path
from typing import Any

from graftory.hub import depot, records, store
from graftory.hub.depot import Depot

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
