"""The matrix R as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


@dataclass(frozen=True, slots=True)
class Panel:
    """One matrix with its title; None leaves a cell empty."""

    title: str
    matrix: Sequence[Sequence[float | None]]


def draw_heatmaps(panels: Sequence[Panel], tasks: Sequence[str]) -> bytes:
    """Draw matrices side by side: a row after each task, a column for each test set, percent in the cells.

    Args:
        panels: What to draw, from left to right, on one scale.
        tasks: Names, in order.

    Returns:
        A PNG image.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(tasks)
    width, height = 1.2 + (0.9 + 1.0 * n) * len(panels), 1.9 + 0.62 * n
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, panel in zip(grid, panels, strict=True):
        image = _draw(axes, panel, tasks)
    grid[0].set_ylabel("after training")
    figure.colorbar(image, ax=grid, label="score, %")
    buffer = io.BytesIO()
    # no time and no version in the file: the same matrix gives the same bytes
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: Axes, panel: Panel, tasks: Sequence[str]) -> AxesImage:
    values = [[float("nan") if value is None else 100 * value for value in row] for row in panel.matrix]
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(tasks)), labels=list(tasks), rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(tasks)), labels=[f"{i + 1}. {task}" for i, task in enumerate(tasks)])
    axes.set_xlabel("tested on")
    axes.set_title(panel.title, fontsize=10)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value == value:  # not NaN
                colour = "white" if value < 60 else "black"
                weight = "bold" if i == j else "normal"
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour, fontweight=weight)
    return image
