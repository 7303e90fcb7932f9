"""The figures of benchmarks/registry.py as JSON, as tables in a terminal and on a page."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """The medians of one operation at one size."""

    operation: str
    versions: int
    process_seconds: float
    call_seconds: float | None
    peak_megabytes: float
    spread: float
    """Largest over smallest time of the repeats: how quiet the machine was."""
    repeats: int

    @property
    def seconds(self) -> float:
        """The time of the call where that is known, else of the process."""
        return self.process_seconds if self.call_seconds is None else self.call_seconds


def growth(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How time and memory grow from each size to the next: as a ratio, and as an exponent of the size."""
    found = []
    for before, after in pairwise(rows):
        if before.operation == after.operation and before.versions:
            time_ratio, memory_ratio = after.seconds / before.seconds, after.peak_megabytes / before.peak_megabytes
            found.append(
                {
                    "operation": before.operation,
                    "from": before.versions,
                    "to": after.versions,
                    "time_ratio": time_ratio,
                    "time_exponent": math.log(time_ratio) / math.log(after.versions / before.versions),
                    "memory_ratio": memory_ratio,
                }
            )
    return found


def targets_of(scale: Sequence[Row], large: Sequence[Row]) -> list[dict[str, Any]]:
    """What was promised, and what was found."""
    row = {(item.operation, item.versions): item for item in scale}
    big = {item.operation: item.seconds for item in large}
    most = max(item.versions for item in scale)
    small = min((item.versions for item in scale if item.versions >= 100), default=most)
    copying = big["copy + sha256"]
    promises = [
        (f"hub list with {small:,} versions, s", row["hub list", small].seconds, 0.25),
        (f"hub list with {most:,} versions, s", row["hub list", most].seconds, 0.5),
        (f"push with {most:,} versions / into an empty hub", row["push", most].seconds / row["push", 0].seconds, 2.0),
        ("push of the large adapter / copy + sha256", big["push"] / copying, 2.0),
        ("pull of the large adapter / copy + sha256", big["pull"] / copying, 2.0),
    ]
    return [{"what": what, "found": found, "at_most": limit, "met": found <= limit} for what, found, limit in promises]


def report_of(scale: list[Row], large: list[Row], size: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """All figures."""
    from graftory.versions import library_versions

    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        **library_versions(),
    }
    copying = next(row.seconds for row in large if row.operation == "copy + sha256")
    return {
        "machine": machine,
        **facts,
        "targets": targets_of(scale, large),
        "scale": [asdict(row) for row in scale],
        "growth": growth(scale),
        "large": {
            "bytes": size,
            "rows": [
                {
                    **{key: value for key, value in asdict(row).items() if key != "versions"},
                    "ratio": row.seconds / copying,
                }
                for row in large
            ],
        },
    }


Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, columns, rows."""


def tables_of(report: Mapping[str, Any]) -> Iterator[Table]:
    """The figures as tables of text."""
    promised = [
        (row["what"], f"{row['found']:.2f}", f"≤ {row['at_most']:g}", "yes" if row["met"] else "no")
        for row in report["targets"]
    ]
    yield "What was promised", ("", "found", "wanted", "met"), promised
    growing = {(row["operation"], row["to"]): row for row in report["growth"]}
    rows = []
    for row in report["scale"]:
        more = growing.get((row["operation"], row["versions"]))
        rows.append(
            (
                row["operation"],
                f"{row['versions']:,}",
                f"{1000 * row['process_seconds']:,.0f}",
                "-" if row["call_seconds"] is None else f"{1000 * row['call_seconds']:,.1f}",
                f"{row['peak_megabytes']:,.0f}",
                f"{more['time_ratio']:.2f} ({more['time_exponent']:+.2f})" if more else "-",
                f"{more['memory_ratio']:.2f}" if more else "-",
                f"{row['spread']:.2f}",
            )
        )
    columns = (
        "operation",
        "versions",
        "process, ms",
        "call, ms",
        "peak, MB",
        "time grows (exponent)",
        "memory grows",
        "max/min",
    )
    yield "As the hub grows", columns, rows
    large = report["large"]
    yield (
        f"One adapter of {large['bytes'] / 1e6:.1f} MB",
        ("operation", "ms", "MB/s", "/ copy + sha256", "peak, MB", "max/min"),
        [
            (
                row["operation"],
                f"{1000 * row['call_seconds']:,.0f}",
                f"{large['bytes'] / 1e6 / row['call_seconds']:,.0f}",
                f"{row['ratio']:.2f}",
                f"{row['peak_megabytes']:,.0f}",
                f"{row['spread']:.2f}",
            )
            for row in large["rows"]
        ],
    )


def print_report(report: Mapping[str, Any]) -> None:
    """The tables, for a terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(width=130)
    for title, columns, rows in tables_of(report):
        table = RichTable(title=title)
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def markdown(report: Mapping[str, Any]) -> str:
    """The tables, for a page."""
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [
        "# The registry as it grows",
        "",
        "`python benchmarks/registry.py`; what is measured stands there.",
        "",
        machine,
        "",
    ]
    for title, columns, rows in tables_of(report):
        lines += [f"## {title}", "", f"| {' | '.join(columns)} |", f"|---{'|--:' * (len(columns) - 1)}|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)
