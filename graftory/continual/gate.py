"""The gate: a step that old tasks fall too far at is not accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graftory.continual.state import RunFolder, Way
from graftory.continual.strategies import Scenario

ALIAS = "accepted"
"""In a run with a gate, means the last accepted version of a name."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of a step."""

    accepted: bool
    drop: float
    """The largest fall of an old task's score, in shares of 1; below 0 if all of them rose."""
    task: str
    """The task that fell most; empty if there are no old ones."""


def judge(before: Mapping[str, float], after: Mapping[str, float], most: float) -> Verdict:
    """Hold the largest drop, max_j (R_aj − R_ij) over the old tasks j, against the bound δ.

    Args:
        before: R_a, scores after the last accepted step a, by task.
        after: R_i of the same tasks, after the step in question.
        most: δ.
    """
    drops = {task: score - after[task] for task, score in before.items()}
    if not drops:
        return Verdict(True, 0.0, "")
    task = max(drops, key=lambda name: drops[name])
    return Verdict(drops[task] <= most + _ROUNDING, drops[task], task)


def scores_of(folder: RunFolder, step: int, tasks: Mapping[str, int], ways: Sequence[Way]) -> dict[str, float]:
    """Scores of tasks after a step, each in the first way in which it has one.

    Args:
        folder: The run's.
        step: Its number.
        tasks: Names and positions.
        ways: In order of preference.
    """
    found = {}
    for name, position in tasks.items():
        cells = (folder.cell(step, position, way) for way in ways)
        found[name] = next(cell.value for cell in cells if cell is not None and cell.value is not None)
    return found


def ways_of(scenario: Scenario, *, routable: bool) -> tuple[Way, ...]:
    """How the gate looks at tasks: as they are answered at test, by the router where nothing else tells the task."""
    return ("routed", "oracle") if routable and scenario != "task" else ("oracle",)
