"""What processes do to a hub at one time, for `test_hub_races`. Nothing here imports torch, so that they start fast."""

from __future__ import annotations

from multiprocessing import get_context
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

from graftory.errors import GraftoryError, VersionConflictError
from graftory.hub import Hub

WAIT = 20.0
"""Seconds after which a race has gone wrong."""
SPAWN = get_context("spawn")


def race(*runs: tuple[Any, ...]) -> list[Any]:
    """Let processes run, each a function with its arguments, from one moment on.

    Returns:
        What each of them returned, in their order; the text of an exception that it ended with.
    """
    barrier, answers = SPAWN.Barrier(len(runs)), SPAWN.Queue()
    racers: list[Any] = [SPAWN.Process(target=_run, args=(barrier, answers, n, *run)) for n, run in enumerate(runs)]
    for racer in racers:
        racer.start()
    try:
        found = dict(answers.get(timeout=WAIT) for _ in racers)
    finally:
        for racer in racers:
            racer.join(WAIT)
            racer.kill()
    return [found[number] for number in range(len(runs))]


def _run(barrier: Barrier, answers: Queue[Any], number: int, function: Any, *arguments: Any) -> None:
    try:
        answer = function(lambda: barrier.wait(WAIT), *arguments)
    except BaseException as error:  # it must not be lost
        answer = f"{type(error).__name__}: {error}"
    answers.put((number, answer))


def push_rounds(start: Any, root: Path, mine: Path, there: Path, rounds: int, kind: str) -> list[str]:
    """Write version 1, 2, ... of a name, each at the same moment as the others do; what came of each."""
    hub, outcomes = Hub(root), []
    for version in range(1, rounds + 1):
        if kind == "push":
            hub.add(mine, name="x", version=version)
        start()
        try:
            if kind == "push":
                hub.push(f"x@{version}", there.as_uri())
            else:
                Hub(there).add(mine, name="x", version=version)
            outcomes.append("won")
        except VersionConflictError:
            outcomes.append("conflict")
    return outcomes


def keep_all(start: Any, root: Path, folders: list[Path], source: str, label: str) -> int:
    """Keep adapters, each under a name of its own and pulled from another hub too; how many versions came of it."""
    hub = Hub(root)
    start()
    for number, folder in enumerate(folders):
        hub.add(folder, name=f"{label}/n{number}")
        hub.pull(f"{source}/s{number}")
    return len(folders)


def collect_until(start: Any, root: Path, ended: Event) -> tuple[int, list[str]]:
    """Collect garbage again and again; how often, and what was removed."""
    hub, rounds, removed = Hub(root), 0, []
    start()
    while not ended.is_set():
        removed += [item.path for item in hub.gc(partial_downloads=True).removed]
        rounds += 1
    return rounds, removed


def then(start: Any, ended: Event, function: Any, *arguments: Any) -> Any:
    """Run something, then say that it has ended."""
    try:
        return function(start, *arguments)
    finally:
        ended.set()


def pull(start: Any, root: Path, remote_ref: str) -> str:
    """Pull a version."""
    hub = Hub(root)
    start()
    return hub.pull(remote_ref).digest


def move_alias(start: Any, root: Path, alias: str, versions: list[int]) -> int:
    """Let an alias mean one version after the other."""
    hub = Hub(root)
    start()
    for version in versions:
        hub.set_alias("x", alias, version)
    return len(versions)


def write_versions(start: Any, root: Path, folders: list[Path]) -> int:
    """Keep version after version of one name, with an alias for the newest."""
    hub = Hub(root)
    start()
    for folder in folders:
        hub.set_alias("x", "newest", hub.add(folder, name="x").version or 0)
    return len(folders)


def watch(start: Any, root: Path, ended: Event) -> tuple[int, list[str]]:
    """Read without the lock while others write; how often, and what was seen that cannot be."""
    hub, looks, wrong, newest, alias = Hub(root), 0, [], 0, 0
    start()
    while not ended.is_set():
        try:
            before = hub.versions("x")[-1]
            row = next(row for row in hub.index() if row.name == "x")
            after = hub.versions("x")[-1]
            record = hub.record(f"x@{row.version}")
            problems = hub.verify().problems if looks % 5 == 0 else ()
        except (GraftoryError, OSError, StopIteration) as error:
            wrong.append(f"{type(error).__name__}: {error}")
            break
        looks += 1
        if not before <= row.version <= after:
            wrong.append(f"the index says {row.version} between {before} and {after}")
        if row.digest != record.digest or row.version < newest or row.aliases.get("newest", 0) < alias:
            wrong.append(f"the row {row} goes back, or is not of its record")
        wrong += [str(problem) for problem in problems]
        newest, alias = row.version, row.aliases.get("newest", 0)
    return looks, wrong[:5]
