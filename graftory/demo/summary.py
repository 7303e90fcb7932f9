"""The demo's last words: one table, and where the pictures are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from graftory.continual.heatmap import Panel, draw_heatmaps
from graftory.continual.report import Report, percent, points
from graftory.demo import plan
from graftory.schema import Json, decode

if TYPE_CHECKING:
    from rich.table import Table


def make_table(results: Mapping[str, Json]) -> Table:
    """All results in one table."""
    from rich.table import Table

    table = Table(title="graftory demo: all-MiniLM-L6-v2, four tasks", title_justify="left")
    for column in ("what", "result", "how it was measured"):
        table.add_column(
            column, justify="right" if column == "result" else "left", no_wrap=column != "how it was measured"
        )
    for section in (_adapters, _moves, _continual, _export):
        for row in section(results):
            table.add_row(*row)
        table.add_section()
    return table


def _adapters(results: Mapping[str, Json]) -> list[tuple[str, str, str]]:
    measured = results["measure"]
    rows = []
    for planned in plan.ADAPTERS:
        trained = results[f"train-{planned.name}"]
        how = (
            f"{planned.config.method}, {trained['weights'] / 1000:.0f} k weights; subsample of {trained['rows']} rows, "
            f"{planned.settings.epochs:g} epochs in {trained['seconds']:.0f} s; "
            f"{measured['tests'][planned.name]} test rows"
        )
        rows.append((f"{trained['ref']} accuracy", f"{percent(measured['own'][planned.name])} %", how))
    return rows


def _moves(results: Mapping[str, Json]) -> list[tuple[str, str, str]]:
    measured, shared = results["measure"], results["share"]
    merged = " + ".join(plan.MERGED)
    rows = [
        (f"merged on {name}", f"{percent(measured['merged'][name])} %", f"exact mean of {merged}, {name}'s own head")
        for name in plan.MERGED
    ]
    speed = f"{measured['rows'] / measured['seconds']:.0f} rows/s"
    rows.append(("mixed batches", speed, f"{measured['rows']} test rows, every row its own adapter and head"))
    pushed = f"{len(shared['pushed'])} pushed, {shared['pulled']} pulled"
    rows.append(("second hub", "same digest" if shared["same"] else "DIFFERENT", pushed))
    return rows


def _continual(results: Mapping[str, Json]) -> list[tuple[str, str, str]]:
    rows = []
    small = f"4 tasks in turn, subsample of {plan.SEQUENCE_ROWS} rows each, {plan.SEQUENCE_TEST_ROWS} test rows"
    for report in _reports(results):
        name, summary = report.strategy, report.summary
        rows.append((f"{name}, task id given: accuracy", f"{percent(summary.acc)} %", small))
        rows.append((f"{name}: backward transfer (BWT)", points(summary.bwt), "points; below 0 is forgetting"))
        if report.routing is not None:
            right = f"names the right task for {percent(report.routing.id_accuracy)} % of rows"
            how = f"{right}; {points(report.routing.regret)} points lost to wrong names"
            rows.append((f"{name}, router: accuracy", f"{percent(report.routing.acc)} %", how))
    return rows


def _reports(results: Mapping[str, Json]) -> list[Report]:
    return [decode(Report, results[f"continual-{name}"], name) for name in plan.STRATEGIES]


def _export(results: Mapping[str, Json]) -> list[tuple[str, str, str]]:
    check = results["export"]
    how = f"largest difference of logits, {check['rows']} test rows, reloaded by transformers"
    return [(f"{plan.EXPORTED} as one plain model", f"{check['max_difference']:.1e}", how)]


def draw(results: Mapping[str, Json], folder: Path) -> list[Path]:
    """Draw what people would rather look at: what is forgotten, strategy beside strategy."""
    reports = _reports(results)
    panels = [Panel(f"{report.strategy}, task id given", report.matrix) for report in reports]
    panels += [Panel(f"{report.strategy}, router", report.routing.matrix) for report in reports if report.routing]
    path = folder / "continual.png"
    path.write_bytes(draw_heatmaps(panels, reports[0].tasks))
    return [path]
