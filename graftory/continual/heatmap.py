"""The matrix R as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence


def draw_heatmap(matrix: Sequence[Sequence[float | None]], tasks: Sequence[str], title: str) -> bytes:
    """Draw R: a row after each task, a column for each test set, percent in the cells.

    Args:
        matrix: Scores; None leaves a cell empty.
        tasks: Names, in order.
        title: What stands above.

    Returns:
        A PNG image.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(tasks)
    values = [[float("nan") if value is None else 100 * value for value in row] for row in matrix]
    figure = Figure(figsize=(2.6 + 1.05 * n, 1.9 + 0.62 * n), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(n), labels=list(tasks), rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(n), labels=[f"{i + 1}. {task}" for i, task in enumerate(tasks)])
    axes.set_xlabel("tested on")
    axes.set_ylabel("after training")
    axes.set_title(title, fontsize=10)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value == value:  # not NaN
                colour = "white" if value < 60 else "black"
                weight = "bold" if i == j else "normal"
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour, fontweight=weight)
    figure.colorbar(image, ax=axes, label="score, %")
    buffer = io.BytesIO()
    # no time and no version in the file: the same matrix gives the same bytes
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
