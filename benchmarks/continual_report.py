"""The tables of `continual.py`."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from continual_picture import draw
from rich.console import Console
from rich.markdown import Markdown

from graftory.continual import Report
from graftory.continual.compare import difference_rows, mean_rows, paired_differences
from graftory.continual.report_text import table
from graftory.schema import Json, decode, encode
from graftory.versions import library_versions

REFERENCE = "seq"


@dataclass(frozen=True, slots=True)
class CostedRun:
    """A finished run and what it cost."""

    setting: str
    order: int
    rate: float
    """Highest learning rate of all but the heads."""
    report: Report
    cpu_seconds: float
    peak_mb: float
    whole: bool
    """Whether it ran through without being stopped, so that its time is that of all of it."""
    reference_seconds: float | None = None
    """What the reference took in the same setting, in the same go: on another day a machine may be another."""

    @property
    def what(self) -> tuple[str, str]:
        """Setting and strategy."""
        return self.setting, self.report.strategy


def write_report(runs: Sequence[CostedRun], tried: Sequence[CostedRun], folder: Path | None) -> None:
    """Print the tables, and write them with the runs; `tried` are those that rates were chosen by.

    Settings and strategies that were not run now stay in the folder's files as they are there.
    """
    runs = beside_reference(runs)
    if folder is not None:
        before = json.loads((folder / "continual.json").read_text())
        runs = updated(read(before["runs"]), runs)
        tried = updated(read(before["tried"]), tried)
    text = markdown(runs, tried)
    Console().print(Markdown(text))
    if folder is None:
        return
    machine = {"system": platform.system(), "processor": platform.machine(), "libraries": library_versions()}
    (folder / "continual.json").write_text(
        json.dumps({"machine": machine, "tried": encode(tuple(tried)), "runs": encode(tuple(runs))}, indent=1) + "\n"
    )
    (folder / "continual.md").write_text(text)
    settings = dict.fromkeys(run.setting for run in runs)
    draw({name: [run.report for run in runs if run.setting == name] for name in settings}, folder / "continual.png")


def read(plain: Sequence[Json]) -> list[CostedRun]:
    """Runs from a file of results."""
    return [decode(CostedRun, one, "continual.json") for one in plain]


def updated(before: Sequence[CostedRun], now: Sequence[CostedRun]) -> list[CostedRun]:
    """What was there, in its order, with the runs of a setting and strategy replaced by those of now."""
    by_what: dict[tuple[str, str], list[CostedRun]] = {}
    for runs in (before, now):
        by_what |= {what: [run for run in runs if run.what == what] for what in _whats(runs)}
    return [run for runs in by_what.values() for run in runs]


def beside_reference(runs: Sequence[CostedRun]) -> list[CostedRun]:
    """Runs of one go, each with what the reference took there."""
    found = {setting: _mean([run for run in runs if run.what == (setting, REFERENCE)]) for setting, _ in _whats(runs)}
    return [replace(run, reference_seconds=run.reference_seconds or found[run.setting]) for run in runs]


def _whats(runs: Sequence[CostedRun]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(run.what for run in runs))


def markdown(runs: Sequence[CostedRun], tried: Sequence[CostedRun]) -> str:
    """All tables."""
    lines = ["# Tasks one after another", "", "`python benchmarks/continual.py`; what is measured stands there."]
    for setting in dict.fromkeys(run.setting for run in runs):
        own = [run for run in runs if run.setting == setting]
        reports = [run.report for run in own]
        tasks = ", ".join(min(own, key=lambda run: run.order).report.tasks)
        lines += ["", f"## {setting}: {tasks}", "", *table(mean_rows(reports))]
        strategies = {report.strategy for report in reports}
        differences = paired_differences(reports, REFERENCE) if REFERENCE in strategies else ()
        if differences:
            lines += ["", f"Paired differences to `{REFERENCE}`, points:", "", *table(difference_rows(differences))]
        lines += ["", "Cost, means over runs:", "", *table(cost_rows(own))]
    for setting in dict.fromkeys(run.setting for run in tried):
        own = [run for run in tried if run.setting == setting]
        lines += ["", f"## Learning rates, `{setting}`: ACC on held-out rows of three tasks in turn, one seed", ""]
        lines += table(rate_rows(own))
    return "\n".join(lines) + "\n"


def rate_rows(tried: Sequence[CostedRun]) -> list[dict[str, str]]:
    """ACC of each strategy by learning rate."""
    rates = sorted({run.rate for run in tried})
    found = {(run.report.strategy, run.rate): f"{100 * run.report.summary.acc:.1f}" for run in tried}
    strategies = dict.fromkeys(run.report.strategy for run in tried)
    return [{"strategy": name, **{f"{rate:g}": found.get((name, rate), "") for rate in rates}} for name in strategies]


def cost_rows(runs: Sequence[CostedRun]) -> list[dict[str, str]]:
    """CPU time and memory of each strategy, and beside those of the reference in the same go."""
    rows = []
    for what in _whats(runs):
        own = [run for run in runs if run.what == what]
        value, base = _mean(own), own[0].reference_seconds
        rows.append(
            {
                "strategy": what[1],
                "CPU s": "–" if value is None else f"{value:.0f}",
                f"times {REFERENCE}": "–" if value is None or not base else f"{value / base:.2f}",
                "peak memory, MB": f"{fmean(run.peak_mb for run in own):.0f}",
                "stored at the end, kB": f"{fmean(sum(run.report.storage[-1].values()) for run in own) / 1000:.0f}",
            }
        )
    return rows


def _mean(runs: Sequence[CostedRun]) -> float | None:
    values = [run.cpu_seconds for run in runs if run.whole]
    return fmean(values) if values else None
