"""What has been done already, so that a demo that was stopped goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from graftory.schema import Json, pretty


class Journal:
    """Results of steps, one small file each; a step with a result is not done again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, step: str) -> Json | None:
        """The result of a step, or None if it is still to do."""
        path = self.folder / f"{step}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def once(self, step: str, make: Callable[[], Json]) -> Json:
        """The result of a step, made now unless it is there; kept before it is returned."""
        known = self.get(step)
        if known is not None:
            return known
        result = make()
        scratch = self.folder / f".{step}.{os.getpid()}"
        scratch.write_bytes(pretty(result))
        scratch.replace(self.folder / f"{step}.json")
        return result
