"""Files of a run: each appears whole or not at all, so a run killed at any moment can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from graftory.errors import DataError
from graftory.schema import Json, canonical, pretty


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the target, then rename over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staging.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write a dataclass or plain values as readable JSON, all or nothing."""
    write_atomically(path, pretty(value))


def read_json(path: Path) -> Json:
    """Read a JSON file.

    Raises:
        DataError: If it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); run the sequence again in a new folder") from error


def append_event(path: Path, event: object) -> None:
    """Add one line to an append-only log; a torn last line of a killed run is left behind a newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
            if torn:
                file.write(b"\n")
        file.write(canonical(event) + b"\n")


def read_events(path: Path) -> Iterator[Json]:
    """The whole lines of the log; a torn one is skipped."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if event is not None:
            yield event
