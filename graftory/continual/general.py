"""What the general-ability probe found in a run, as data and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graftory.continual.evaluation import ABSTAINED
from graftory.continual.probed import Probed
from graftory.continual.state import RunFolder


@dataclass(frozen=True, slots=True)
class General:
    """Loss on general text, in nats per token; of every step that of the last accepted one."""

    texts: int
    tokens: int
    base: float
    """Of the bare base, before the first task."""
    given: tuple[float, ...]
    """After each step, the mean over the adapters that answer the tasks learnt so far."""
    worst: tuple[float, ...]
    """And the highest of them."""
    routed: tuple[float, ...] | None = None
    """With the adapter, or the bare base, that the router takes for each text; None without a router."""
    abstained: tuple[float, ...] | None = None
    """Share of the texts that it leaves to the bare base."""


def general_of(folder: RunFolder, steps: Sequence[int]) -> General | None:
    """Gather the probe's points; None if there are none.

    Args:
        folder: The run's.
        steps: The step in force after each task.
    """
    base = folder.probed(0)
    points = [point for point in (folder.probed(step) for step in steps) if point is not None]
    if base is None or len(points) < len(steps):
        return None
    routed = tuple(point.routed for point in points if point.routed is not None)
    found = len(routed) == len(points)
    return General(
        texts=base.texts,
        tokens=base.tokens,
        base=base.loss,
        given=tuple(point.loss for point in points),
        worst=tuple(max(point.tasks.values()) for point in points),
        routed=routed if found else None,
        abstained=tuple(map(_abstained, points)) if found else None,
    )


def general_rows(general: General, tasks: Sequence[str]) -> list[dict[str, str]]:
    """A table: the bare base, then one row a step, ready to print."""
    before = {"after": "(bare base)", **_cells("", general.base, general.base)}
    before |= {"worst adapter": "–"} if general.worst != general.given else {}
    rows = [before]
    for i, task in enumerate(tasks):
        row = {"after": task, **_cells("", general.given[i], general.base)}
        if general.worst != general.given:
            row["worst adapter"] = perplexity(general.worst[i])
        if general.routed is not None and general.abstained is not None:
            row |= {**_cells(", router", general.routed[i], general.base)}
            row["left to the base"] = f"{100 * general.abstained[i]:.1f} %"
        rows.append(row)
    columns = list(rows[-1])
    return [{column: row.get(column, "–") for column in columns} for row in rows]


def perplexity(loss: float) -> str:
    """exp(L)."""
    return f"{math.exp(loss):.2f}"


def nats(change: float) -> str:
    """A difference of losses with its sign; exactly 0 is told apart from what rounds to it."""
    return "0" if change == 0 else f"{change:+.3f}"


def _cells(way: str, loss: float, base: float) -> dict[str, str]:
    return {f"loss{way}": f"{loss:.3f}", f"perplexity{way}": perplexity(loss), f"change{way}": nats(loss - base)}


def _abstained(point: Probed) -> float:
    return point.routes.get(ABSTAINED, 0) / point.texts
