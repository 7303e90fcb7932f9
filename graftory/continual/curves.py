"""A run over time as pictures: what became of each task, and what is stored."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from graftory.continual.general import General

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_curves(tasks: Sequence[str], ways: Mapping[str, Sequence[Sequence[float | None]]]) -> bytes:
    """Draw, beside each other, the score of each task from its training on, and the mean over the tasks seen so far.

    Args:
        tasks: Names, in order.
        ways: R by the way the task is known; the first is drawn on the left.

    Returns:
        A PNG image.
    """
    figure, [left, right] = _figure(2)
    steps = range(1, len(tasks) + 1)
    matrix = next(iter(ways.values()))
    for j, task in enumerate(tasks):
        left.plot(steps[j:], [_percent(row[j]) for row in matrix[j:]], marker="o", label=task)
    for name, rows in ways.items():
        means = [_mean(row[: i + 1]) for i, row in enumerate(rows)]
        right.plot(steps, means, marker="o", label=name)
    for axes, title in ((left, "each task"), (right, "mean over the tasks seen")):
        _label(axes, title, tasks, "score, %")
    return _png(figure)


def draw_general(tasks: Sequence[str], general: General) -> bytes:
    """Draw the perplexity of general text, from the bare base on.

    Args:
        tasks: Names, in order.
        general: What the probe found.

    Returns:
        A PNG image.
    """
    figure, [axes] = _figure(1)
    several = general.worst != general.given
    lines: dict[str, Sequence[float]] = {"mean over the tasks' adapters" if several else "adapter": general.given}
    lines |= {"worst adapter": general.worst} if several else {}
    lines |= {} if general.routed is None else {"router": general.routed}
    for name, losses in lines.items():
        axes.plot(range(len(tasks) + 1), [math.exp(loss) for loss in (general.base, *losses)], marker="o", label=name)
    axes.axhline(math.exp(general.base), color="black", linestyle="--", linewidth=1, label="bare base")
    _label(axes, "general text", tasks, "perplexity")
    axes.set_xticks(range(len(tasks) + 1), labels=["(base)", *tasks], rotation=30, ha="right", rotation_mode="anchor")
    return _png(figure)


def draw_storage(tasks: Sequence[str], storage: Sequence[Mapping[str, int]]) -> bytes:
    """Draw what is stored after each step, stacked by what it is.

    Args:
        tasks: Names, in order.
        storage: Bytes after each step, by what they are.

    Returns:
        A PNG image.
    """
    figure, [axes] = _figure(1)
    kinds = sorted({kind for step in storage for kind in step})
    below = [0.0] * len(storage)
    for kind in kinds:
        heights = [step.get(kind, 0) / 1000 for step in storage]
        axes.bar(range(1, len(storage) + 1), heights, bottom=below, label=kind)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    _label(axes, "stored", tasks, "kB")
    return _png(figure)


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _label(axes: Axes, title: str, tasks: Sequence[str], unit: str) -> None:
    axes.set_xticks(range(1, len(tasks) + 1), labels=list(tasks), rotation=30, ha="right", rotation_mode="anchor")
    axes.set_xlabel("after training")
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # no time and no version in the file: the same run gives the same bytes
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _percent(value: float | None) -> float:
    return float("nan") if value is None else 100 * value


def _mean(values: Sequence[float | None]) -> float:
    return sum(_percent(value) for value in values) / len(values)
