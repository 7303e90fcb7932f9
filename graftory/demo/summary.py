"""The demo's last words: one table, and where the pictures are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from graftory.continual.heatmap import Panel, draw_heatmaps
from graftory.continual.report import Report
from graftory.continual.report_text import percent, points
from graftory.demo import plan
from graftory.schema import Json, decode

if TYPE_CHECKING:
    from rich.table import Table


def make_table(results: Mapping[str, Json]) -> Table:
    """All results in one table."""
    from rich.table import Table

    title = f"graftory demo: four tasks on all-MiniLM-L6-v2, {plan.TEST_ROWS} test rows each, one seed"
    table = Table(title=title, title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("result", justify="right", no_wrap=True)
    table.add_column("how")
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
            f"{planned.config.method}, {trained['weights'] / 1000:.0f} k weights, {planned.settings.epochs:g} epochs "
            f"on {trained['rows']} rows (a subsample) in {trained['seconds']:.0f} s"
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
    rows.append(("mixed batches", speed, f"{measured['rows']} rows, each its own adapter and head"))
    pushed = f"{len(shared['pushed'])} pushed, {shared['pulled']} pulled"
    rows.append(("second hub", "same digest" if shared["same"] else "DIFFERENT", pushed))
    return rows


def _continual(results: Mapping[str, Json]) -> list[tuple[str, str, str]]:
    rows = []
    small = f"4 tasks in turn, {plan.SEQUENCE_ROWS} rows each (a subsample), {plan.SEQUENCE_TEST_ROWS} test rows"
    for report in _reports(results):
        name, summary = report.strategy, report.summary
        rows.append((f"{name}, task id given: accuracy", f"{percent(summary.acc)} %", small))
        rows.append((f"{name}: backward transfer (BWT)", points(summary.bwt), "points; below 0 is forgetting"))
        if report.routing is not None:
            right = f"names the right task for {percent(report.routing.id_accuracy)} % of rows"
            how = f"{right}; {percent(report.routing.regret)} points lost to wrong names"
            rows.append((f"{name}, router: accuracy", f"{percent(report.routing.acc)} %", how))
    return rows


def _reports(results: Mapping[str, Json]) -> list[Report]:
    return [decode(Report, results[f"continual-{name}"], name) for name in plan.STRATEGIES]


def _export(results: Mapping[str, Json]) -> list[tuple[str, str, str]]:
    check = results["export"]
    how = f"largest difference of logits on {check['rows']} test rows, reloaded with transformers alone"
    return [(f"{plan.EXPORTED} as one plain model", f"{check['max_difference']:.1e}", how)]


def draw(results: Mapping[str, Json], folder: Path) -> list[Path]:
    """Draw what people would rather look at: what is forgotten, strategy beside strategy."""
    reports = _reports(results)
    panels = [Panel(f"{report.strategy}, task id given", report.matrix) for report in reports]
    panels += [Panel(f"{report.strategy}, router", report.routing.matrix) for report in reports if report.routing]
    path = folder / "continual.png"
    path.write_bytes(draw_heatmaps(panels, reports[0].tasks))
    return [path]
