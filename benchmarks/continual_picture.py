"""The picture of `continual.py`: what each strategy has of all tasks in the end, and what it lost on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from graftory.continual import Report
from graftory.continual.metrics import backward_transfer

GAIN, LOSS, NEUTRAL = "#2f7d4f", "#b8432f", "#4a6fa5"
TITLE = (
    "ACC at the end, dots are runs. Red: earlier tasks lost a point or more on the way (BWT); green: they gained one"
)
FEW = 6
"""Strategies that a panel of the lower row has at most."""
FELT = 0.01
"""BWT beyond this is coloured."""


def draw(reports: Mapping[str, Sequence[Report]], file: Path) -> None:
    """One panel a setting, those of few strategies below; every run is a dot, their mean a bar coloured by BWT."""
    rows = {name: scores(own) for name, own in reports.items()}
    tall = {name: found for name, found in rows.items() if len(found) > FEW}
    parts = [part for part in (tall, {name: found for name, found in rows.items() if name not in tall}) if part]
    heights = [1.0 + 0.28 * max(map(len, part.values())) for part in parts]
    figure = Figure(figsize=(11, 0.4 + sum(heights)), layout="constrained")
    for part, place in zip(
        parts, figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0], strict=True
    ):
        most = max(map(len, part.values()))
        for axes, (name, found) in zip(place.subplots(1, len(part), squeeze=False)[0], part.items(), strict=True):
            panel(axes, name, found)
            axes.set_ylim(len(found) - most - 0.6, len(found) - 0.4)
    figure.suptitle(TITLE, fontsize=10)
    figure.savefig(file, dpi=110)


def scores(reports: Sequence[Report]) -> list[tuple[str, list[float], float]]:
    """Strategies with the ACC of their runs and their mean BWT, the best last."""
    found: dict[str, list[float]] = {}
    moved: dict[str, list[float]] = {}
    for report in reports:
        found.setdefault(report.strategy, []).append(report.summary.acc)
        moved.setdefault(report.strategy, []).append(report.summary.bwt or 0.0)
        if report.routing is not None:
            routed = f"{report.strategy}, routed"
            found.setdefault(routed, []).append(report.routing.acc)
            matrix = [[value or 0.0 for value in row] for row in report.routing.matrix]  # None where nothing is learnt
            moved.setdefault(routed, []).append(backward_transfer(matrix))
    return sorted(((name, accs, fmean(moved[name])) for name, accs in found.items()), key=lambda row: fmean(row[1]))


def panel(axes: Axes, title: str, rows: Sequence[tuple[str, list[float], float]]) -> None:
    """One setting."""
    for height, (_, accs, moved) in enumerate(rows):
        colour = LOSS if moved < -FELT else GAIN if moved > FELT else NEUTRAL
        axes.barh(height, 100 * fmean(accs), color=colour, alpha=0.75, height=0.7)
        axes.plot([100 * acc for acc in accs], [height] * len(accs), "o", color="black", markersize=3, alpha=0.6)
        axes.text(1, height, f"{100 * fmean(accs):.1f}", va="center", ha="left", color="white", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=8)
    axes.set_xlim(0, 100)
    axes.set_xlabel("ACC, %")
    axes.set_title(title)
