"""A plain recommendation: merge, or keep the adapters apart and route each row to its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graftory.compose.merge.report.interference import Interference
from graftory.compose.merge.report.retention import Retention, worst

KEEP = 0.95
"""Share of its own adapter's score that every task must keep."""
AGREE = 0.5**0.5
"""Least agreement: more of what the merge does to what an adapter reads is that adapter's own doing than not."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do, and why.

    Attributes:
        what: `merge`, or `route`: keep the adapters and let each row use its own.
        reason: In one line.
    """

    what: Literal["merge", "route"]
    reason: str


def advise(found: Interference, kept: Sequence[Retention] = (), *, keep: float = KEEP) -> Advice:
    """Recommend by what was measured on rows, else by how much of each update survives.

    With rows: merge if every task keeps `keep` of its own adapter's score. Without: merge if the agreement of every
    adapter is at least √½. That is a rule of thumb: it sees updates, and no task.

    Args:
        found: The interference.
        kept: The retention, where it was measured.
        keep: Share of a score that is enough.
    """
    lost = worst(kept)
    if lost is not None and lost.retained is not None:
        change = f"{lost.metric} {lost.own:.3f} alone, {lost.merged:.3f} merged, on {lost.rows} rows"
        if lost.retained >= keep:
            least_kept = f"least {lost.task}, {lost.retained:.1%} ({change})"
            return Advice("merge", f"every task keeps {keep:.0%} or more; {least_kept}")
        return Advice("route", f"{lost.task} keeps only {lost.retained:.1%} of its own adapter's score ({change})")
    least = min(found.effects, key=lambda effect: effect.agreement)
    seen = "its inputs" if found.by_inputs else "what it reads"
    told = f"{least.adapter} and the merge agree by {least.agreement:.2f} on {seen}"
    unsure = "" if found.by_inputs else "; rows would tell more: --report-rows"
    if least.agreement >= AGREE:
        return Advice("merge", f"every update survives: least of all {told}, {AGREE:.2f} is enough{unsure}")
    return Advice("route", f"an update is lost: {told}, below {AGREE:.2f}{unsure}")
