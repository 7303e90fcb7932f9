"""A run killed at any moment goes on to the same end: see `tests/continual_crash.py`, which takes more points too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.continual_samples import make_place

PHASES = ("start", "prepare", "train", "consolidate", "eval", "commit")


def test_a_run_killed_in_any_phase_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """Replay keeps rows and heads from task to task, so what is kept is in it too."""
    place, folder = tmp_path / "place", tmp_path / "runs"
    place.mkdir()
    folder.mkdir()
    make_place(place)
    command = [sys.executable, "-m", "tests.continual_crash", str(place), str(folder), "replay", "24"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert len(found["killed"]) == sum(found["kills"]) == 24
    assert {found["killed"].count(phase) for phase in PHASES} == {4}
    assert found["operations"] > 100
