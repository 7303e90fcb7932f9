"""The report as a picture: modules down, pairs and adapters across."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from graftory.compose.merge.report.interference import Effect, Interference, Pair
from graftory.compose.merge.report.retention import Retention
from graftory.compose.merge.report.whole import MergeReport
from graftory.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

K = TypeVar("K")
FORMATS = ("png", "svg", "pdf")
_PAIRS: Sequence[tuple[str, Callable[[Pair], float]]] = (
    ("sign conflict", lambda pair: pair.sign_conflict),
    ("overlap, written", lambda pair: pair.write_overlap),
    ("overlap, read", lambda pair: pair.read_overlap),
)
_EFFECTS: Sequence[tuple[str, Callable[[Effect], float]]] = (("agreement", lambda effect: effect.agreement),)


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[float]]


def check_picture(path: Path) -> Path:
    """A path that a picture can be written to, before anything is worked out for it.

    Raises:
        ConfigError: If its ending is no format, or its folder is not there.
    """
    if path.suffix.lower()[1:] not in FORMATS:
        raise ConfigError(
            f"--report {path}: got the ending {path.suffix!r}, wanted {', '.join('.' + f for f in FORMATS)}"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"--report {path}: there is no folder {str(path.parent)!r}; make it first")
    return path


def draw_report(report: MergeReport, kind: str = "png") -> bytes:
    """Draw a report; the same one gives the same bytes.

    Args:
        report: The report.
        kind: One of `FORMATS`.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(report.interference)
    height = 2.6 + 0.24 * len(report.interference.places)
    widths = [2.0 + 0.55 * len(panel.columns) for panel in panels]
    below = 1.2 + 0.45 * len(report.retention) if report.retention else 0.0
    figure = Figure(figsize=(3.5 + sum(widths), height + below), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    top: Any = figure
    if report.retention:
        halves: Any = figure.subfigures(2, 1, height_ratios=[height, below])
        top, bottom = halves
        _bars(bottom.subplots(), report.retention)
    grid = top.subplots(1, len(panels), squeeze=False, sharey=True, width_ratios=widths)[0]
    for axes, panel in zip(grid, panels, strict=True):
        _draw(axes, panel)
    paths = [place.path for place in report.interference.places]
    grid[0].set_yticks(range(len(paths)), labels=paths, fontsize=7)
    title = f"{report.method}: {report.advice.what}. {report.advice.reason}"
    figure.suptitle(textwrap.fill(title, 110), fontsize=9)
    buffer = io.BytesIO()
    # no time and no version in the file
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None, "Producer": None}}
    with matplotlib.rc_context({"svg.hashsalt": "graftory"}):
        figure.savefig(buffer, format=kind, metadata=metadata[kind])
    return buffer.getvalue()


def _panels(found: Interference) -> list[_Panel]:
    pairs = [(pair.first, pair.second) for pair in found.pairs]
    panels = [
        _Panel(
            title,
            [f"{first}, {second}" for first, second in pairs],
            [_row({(one.first, one.second): value(one) for one in place.pairs}, pairs) for place in found.places],
        )
        for title, value in _PAIRS
        if pairs
    ]
    names = [effect.adapter for effect in found.effects]
    on = "inputs" if found.by_inputs else "what it reads"
    return panels + [
        _Panel(
            f"{title} on {on}",
            names,
            [_row({one.adapter: value(one) for one in place.effects}, names) for place in found.places],
        )
        for title, value in _EFFECTS
    ]


def _row(values: dict[K, float], keys: Sequence[K]) -> list[float]:
    return [values.get(key, float("nan")) for key in keys]


def _draw(axes: Axes, panel: _Panel) -> None:
    axes.imshow(panel.rows, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(panel.columns)), labels=panel.columns, rotation=30, ha="right", fontsize=7)
    axes.set_title(panel.title, fontsize=9)
    for i, row in enumerate(panel.rows):
        for j, value in enumerate(row):
            if value == value:  # not NaN
                colour = "white" if value < 0.6 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=6)


def _bars(axes: Axes, found: Sequence[Retention]) -> None:
    """What each task scores: the bare base, its own adapter, the merge."""
    parts = {"base": [one.base for one in found], "its own adapter": [one.own for one in found]}
    parts["merged"] = [one.merged for one in found]
    for number, (label, values) in enumerate(parts.items()):
        axes.barh([row + 0.25 * (number - 1) for row in range(len(found))], values, height=0.22, label=label)
    axes.set_yticks(range(len(found)), labels=[f"{one.task}, {one.metric}" for one in found], fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="lower left")
