"""The folder of a run: what has been done, in files that each appear whole or not at all.

sequence.json         the sequence; a run goes on only with the same one (tasks may be appended)
events.jsonl          append-only log of phases
steps/001.json        a committed step: task, reference, digest; written last of all
cells/001-002-oracle.json   R[1][2]: after step 1, on task 2; step 0 is before any training
probe/001.json        loss on general text after step 1; step 0 is the bare base
kept/001.safetensors  what the strategy kept at a step: a basis, importances, samples
router.safetensors    the router over the accepted tasks
router-next.safetensors   and over the one in progress
logs/                 TensorBoard's files, if they are asked for
work/                 checkpoints of the task in progress; deleted at its commit
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from graftory.continual.files import append_event, read_events, read_json, write_atomically, write_json
from graftory.continual.kept_file import load_kept, save_kept
from graftory.continual.probed import Probed
from graftory.continual.sequence import TaskSequence
from graftory.continual.strategies.base import Kept
from graftory.errors import ConfigError, DataError
from graftory.schema import Json, decode, encode

Phase = Literal["prepare", "train", "consolidate", "eval", "rejected", "commit"]
Way = Literal["oracle", "routed"]


@dataclass(frozen=True, slots=True)
class Event:
    """A phase that has begun."""

    step: int
    """From 1; 0 is what comes before the first task."""
    task: str
    phase: Phase
    time: str = ""
    detail: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry of the matrix."""

    step: int
    task: int
    way: Way
    metric: str
    value: float | None
    """None where the metric cannot be taken: routed rows of a metric that is no mean over rows."""
    n: int
    routes: Mapping[str, int] = field(default_factory=dict)
    """Routed: how many rows went to each task, and to `abstained`."""
    copied: bool = False
    """Whether it is that of the step before, as all that answers is the same; see `unchanged`."""
    loss: float | None = None
    """Of language models, with the id given: nats per token of the answers."""
    mark: str = ""
    """sha256 over what answers; empty where that cannot be told, so that it is always measured."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A committed step."""

    step: int
    task: str
    ref: str
    digest: str
    frozen: str
    """sha256 over all tensors that had to stay as they were while this step learnt."""
    train_rows: int
    test_rows: int
    kept: str = ""
    """sha256 over what the strategy kept; empty if that is nothing."""
    stored: Mapping[str, int] = field(default_factory=dict)
    """Bytes that answering and going on need after this step, by what they are."""
    accepted: bool = True
    """Whether the run goes on from it; if not, the state of the last accepted step stays in force."""
    drop: float = 0.0
    """The largest fall of an old task's score, where the run has a gate."""
    fell: str = ""
    """The task that fell most."""


class RunFolder:
    """Reads and writes the folder of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, sequence: TaskSequence) -> None:
        """Claim the folder for a sequence, or go on with it.

        Raises:
            ConfigError: If the folder holds another sequence.
        """
        path = self.root / "sequence.json"
        if not path.exists():
            write_json(path, sequence)
            return
        before = self.sequence()
        old, new = encode(before), encode(sequence)
        changed = [key for key, value in old.items() if key not in ("tasks", "report_to") and new[key] != value]
        if sequence.tasks[: len(before.tasks)] != before.tasks:
            changed.append("tasks")
        if changed:
            raise ConfigError(
                f"{self.root} holds a run of another sequence (other {', '.join(changed)}); a run goes on only as it "
                "began, with tasks appended at most; give a new folder"
            )
        write_json(path, sequence)

    def sequence(self) -> TaskSequence:
        """What is run here.

        Raises:
            DataError: If the folder holds no run.
        """
        path = self.root / "sequence.json"
        if not path.exists():
            raise DataError(f"{self.root} holds no run; give the folder of one, as hub continual run --dir made it")
        return decode(TaskSequence, read_json(path), str(path))

    def log(self, event: Event) -> Event:
        """Append an event, with the time of now."""
        event = replace(event, time=datetime.now(timezone.utc).isoformat())
        append_event(self.root / "events.jsonl", event)
        return event

    def events(self) -> list[Event]:
        """All events of all starts of the run."""
        path = self.root / "events.jsonl"
        return [decode(Event, data, str(path)) for data in read_events(path)]

    def commits(self) -> list[Commit]:
        """The committed steps in order."""
        paths = sorted((self.root / "steps").glob("*.json"))
        return [decode(Commit, read_json(path), str(path)) for path in paths]

    def commit(self, commit: Commit) -> None:
        """Commit a step: the last thing that is written of it."""
        write_json(self.root / "steps" / f"{commit.step:03}.json", commit)

    def cell(self, step: int, task: int, way: Way) -> Cell | None:
        """A measured cell, or None."""
        path = self._cell_path(step, task, way)
        return decode(Cell, read_json(path), str(path)) if path.exists() else None

    def put_cell(self, cell: Cell) -> Cell:
        """Keep a cell."""
        write_json(self._cell_path(cell.step, cell.task, cell.way), cell)
        return cell

    def probed(self, step: int) -> Probed | None:
        """What the probe found after a step, or None."""
        path = self._probe_path(step)
        return decode(Probed, read_json(path), str(path)) if path.exists() else None

    def put_probed(self, probed: Probed) -> None:
        """Keep what the probe found."""
        write_json(self._probe_path(probed.step), probed)

    def put_kept(self, step: int, kept: Kept) -> str:
        """Keep what a strategy keeps at a step; returns its hash."""
        return save_kept(kept, self._kept_path(step))

    def kept(self, commit: Commit) -> Kept:
        """What a strategy kept at a committed step.

        Raises:
            CorruptAdapterError: If it is not what was kept then.
        """
        return load_kept(self._kept_path(commit.step), commit.kept)

    @property
    def router(self) -> Path:
        """The router's file."""
        return self.root / "router.safetensors"

    @property
    def next_router(self) -> Path:
        """The router's file while a step is not committed."""
        return self.root / "router-next.safetensors"

    def begin_router(self) -> Path:
        """Let the next router start from the present one, whatever an earlier start of the run left of it."""
        if self.router.exists():
            write_atomically(self.next_router, self.router.read_bytes())
        else:
            self.next_router.unlink(missing_ok=True)
        return self.next_router

    def end_router(self, *, accepted: bool) -> None:
        """Put the next router in the present one's place, or throw it away."""
        if accepted and self.next_router.exists():
            self.next_router.replace(self.router)
        self.next_router.unlink(missing_ok=True)

    def work(self, step: int) -> Path:
        """The checkpoints of a step."""
        return self.root / "work" / f"{step:03}"

    def logs(self, step: int, task: str) -> Path:
        """Where TensorBoard's files of a step go."""
        return self.root / "logs" / f"{step:03}-{task}"

    def _kept_path(self, step: int) -> Path:
        return self.root / "kept" / f"{step:03}.safetensors"

    def _probe_path(self, step: int) -> Path:
        return self.root / "probe" / f"{step:03}.json"

    def _cell_path(self, step: int, task: int, way: Way) -> Path:
        return self.root / "cells" / f"{step:03}-{task:03}-{way}.json"
