"""Being written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from graftory.hub.records import Record


def write_layout(  # noqa: D103
    record: Record, files: Mapping[str, memoryview], target: Path, *, layout: str, served_base: str | None
) -> Path:
    raise NotImplementedError
