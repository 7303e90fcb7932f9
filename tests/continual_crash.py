"""Kills a run of a sequence again and again before file operations, and looks whether it comes to the same end.

Every start of the run is in a forked child that counts its own file operations (opening for writing, rename, remove,
mkdir, rmdir) by an audit hook and ends itself with SIGKILL before the chosen one. The next start goes on in the same
folder and is killed somewhere else, until a start comes to the end; then the folder is compared with that of a run that
was never killed, and another one is begun until there have been enough kills. Checkpoints are written every few steps,
so there are operations in all phases, the training among them. Phases take turns; the operation within the phase is
drawn by a fixed seed.

Run as a program, so that no thread of a test is forked: `python -m tests.continual_crash PLACE FOLDER STRATEGY POINTS`
prints JSON: the phases in which runs were killed, how often each folder was, and what differed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from graftory.continual import TaskSequence, load_sequence, run_sequence
from graftory.continual.state import RunFolder
from graftory.hub import Hub
from tests.continual_samples import SHORT, sequence_file

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def child(work: Callable[[], None]) -> int:
    """Do something in a forked child; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(sequence: TaskSequence, root: Path, point: tuple[str, int] | None = None, log: Path | None = None) -> None:
    """Run the sequence in a folder, or go on with it.

    Args:
        sequence: What to run.
        root: The folder.
        point: The phase, and the operation in it from 1, before which the process ends; None for none.
        log: Where to write the phase of every operation.
    """
    phases: list[str] = []
    phase = ["start"]

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING)
        if not changes or not str(arguments[0]).startswith(str(root)):
            return
        phases.append(phase[0])
        if (phase[0], phases.count(phase[0])) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    hub = Hub.create(root / "hub")
    run_sequence(sequence, hub, root / "run", progress=lambda event: phase.__setitem__(0, event.phase))
    if log is not None:
        log.write_text(json.dumps(phases))


def end_of(root: Path) -> dict[str, Any]:
    """All that must be the same: the matrix, what was committed, every version with its lineage, what was kept."""
    hub, folder = Hub.open(root / "hub"), RunFolder(root / "run")
    found: dict[str, Any] = {
        str(path.relative_to(root)): path.read_text()
        for part in ("steps", "cells")
        for path in sorted((root / "run" / part).glob("*.json"))
    }
    for commit in folder.commits():
        record = hub.record(commit.ref)
        found[commit.ref] = [record.digest, [(p.ref, p.digest, p.relation) for p in record.spec.lineage.parents]]
    found["versions"] = [(row.name, row.version, row.digest) for row in hub.index()]
    found["problems"] = [str(problem) for problem in hub.verify().problems]
    return found


class Points:
    """Phases in turn, each with an operation such as one step of the run has. A phase that a start did not come to, or
    of which too little was left to do, comes next.
    """

    def __init__(self, phases: list[str], steps: int) -> None:
        self.sizes = {phase: max(1, phases.count(phase) // steps) for phase in dict.fromkeys(phases)}
        self.turns, self.generator = deque(self.sizes), random.Random(0)

    def next(self) -> tuple[str, int]:
        """Where the next start is to be killed."""
        phase = self.turns[0]
        return phase, self.generator.randint(1, self.sizes[phase])

    def hit(self) -> None:
        """It was."""
        self.turns.rotate(-1)


def main(place: Path, folder: Path, strategy: str, count: int) -> None:
    """Kill, go on, compare."""
    torch.set_num_threads(1)
    base = load_sequence(sequence_file(place, "isolated", ["colours", "animals"]))
    sequence = replace(base, strategy=strategy, train={**SHORT, "save_steps": 5})
    # pictures are drawn at the end, when all is committed, and take longer than all else
    patch("graftory.continual.runner.write_report").start()
    log = folder / "phases.json"
    assert child(lambda: run(sequence, folder / "whole", log=log)) == 0
    phases, expected = json.loads(log.read_text()), end_of(folder / "whole")
    found: dict[str, Any] = {"operations": len(phases), "killed": [], "wrong": [], "kills": []}
    points = Points(phases, len(sequence.tasks))
    while len(found["killed"]) < count and not found["wrong"]:
        root = folder / f"killed-{len(found['kills'])}"
        killed = goes_on(sequence, root, points, count - len(found["killed"]))
        end = end_of(root)
        found["killed"] += killed
        found["kills"].append(len(killed))
        found["wrong"] += sorted(key for key in {*end, *expected} if end.get(key) != expected.get(key))
    print(json.dumps(found))


def goes_on(sequence: TaskSequence, root: Path, points: Points, most: int) -> list[str]:
    """Start a run until it comes to its end; the phases in which it was killed before."""
    killed: list[str] = []
    while True:
        point = points.next() if len(killed) < most else None
        status = child(lambda point=point: run(sequence, root, point))  # type: ignore[misc]
        if status == 0:
            return killed
        assert (status, point is not None) == (-signal.SIGKILL, True), f"{root}: ended with {status} at {point}"
        points.hit()
        killed.append(point[0])  # type: ignore[index]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
