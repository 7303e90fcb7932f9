"""Kills a run of a sequence at file operations, lets it go on, and looks whether it comes to the same end.

The run is in a forked child that counts its own file operations (opening for writing, rename, remove, mkdir, rmdir)
by an audit hook and ends itself with SIGKILL before the chosen one. Checkpoints are written every few steps, so there
are operations in all phases, the training among them. Points are drawn by a fixed seed, as many from each phase.

Run as a program, so that no thread of a test is forked: `python -m tests.continual_crash PLACE FOLDER STRATEGY POINTS`
prints JSON: the phases in which runs were killed, and what differed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
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


def run(sequence: TaskSequence, root: Path, stop_at: int = 0, log: Path | None = None) -> None:
    """Run the sequence in a folder.

    Args:
        sequence: What to run.
        root: The folder.
        stop_at: The operation before which the process ends; 0 for none.
        log: Where to write the phase of every operation.
    """
    phases: list[str] = []
    phase = ["start"]

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING)
        if not changes or not str(arguments[0]).startswith(str(root)):
            return
        phases.append(phase[0])
        if len(phases) == stop_at:
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


def points_of(phases: list[str], count: int) -> list[int]:
    """Operations to die before, from 1: spread over the phases as evenly as it goes."""
    generator = random.Random(0)
    by_phase: dict[str, list[int]] = {}
    for number, phase in enumerate(phases, 1):
        by_phase.setdefault(phase, []).append(number)
    for numbers in by_phase.values():
        generator.shuffle(numbers)
    order = [numbers[turn] for turn in range(len(phases)) for numbers in by_phase.values() if turn < len(numbers)]
    return order[:count]


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
    found: dict[str, Any] = {"operations": len(phases), "killed": [], "wrong": []}
    for point in points_of(phases, count):
        root = folder / f"killed-{point}"
        if child(lambda root=root, point=point: run(sequence, root, point)) != -signal.SIGKILL:  # type: ignore[misc]
            found["wrong"].append(f"{point}: was not killed")
        found["killed"].append(phases[point - 1])
        if child(lambda root=root: run(sequence, root)) != 0:  # type: ignore[misc]
            found["wrong"].append(f"{point} ({phases[point - 1]}): did not go on")
            continue
        end = end_of(root)
        different = sorted(key for key in {*end, *expected} if end.get(key) != expected.get(key))
        found["wrong"] += [f"{point} ({phases[point - 1]}): {', '.join(different)}"] if different else []
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
