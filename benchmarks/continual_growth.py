"""What a continual run costs as its tasks become many: one run of 40 tasks, looked at after 5, 10, 20 and 40.

    python benchmarks/continual_growth.py                       # all strategies; --folder keeps what is done
    python benchmarks/continual_growth.py --strategies isolated --tasks 10 --no-write
    python benchmarks/continual_growth.py --strategies gated    # the rows of the others stay in the results

Base: All-MiniLM-L6-v2, fp32; LoRA of rank 8 on all linears; 20 steps of 8 rows a task, heads at 1e-2. Tasks: pairs of
banking77's intents, then SMS spam and disaster tweets; 40 test rows each. All are told the task but for the router. CPU
seconds are those of one step: training, what is kept, the router, and measuring all 40 tasks but for those that are
answered as before, as `isolated` answers all but the newest. The last tasks' texts are longer. The steps of a run are
in one process.

The results go to benchmarks/results/continual_growth.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from intents import split_intents
from rich.console import Console
from rich.markdown import Markdown

from graftory.continual import Event, Limits, Report, TaskSequence, load_report, run_sequence
from graftory.continual.report_text import table
from graftory.continual.state import RunFolder
from graftory.hub import Hub
from graftory.versions import library_versions

RATES = {
    **dict.fromkeys(("seq", "slao", "o-lora", "sd-lora", "replay", "ranpac"), 5e-4),
    "isolated": 1e-3,
    "gated": 2e-3,
}
"""As `continual.py` chose them."""
POINTS = (5, 10, 20, 40)
Row = dict[str, Any]


def main() -> None:
    """Run what is not there yet, and report."""
    options = arguments()
    if options.one:
        run_one(options.folder, options.one, options.tasks)
        return
    rows = []
    for strategy in options.strategies.split(","):
        place = folder_of(options.folder, strategy, options.tasks)
        if not (place / "clock.json").exists():
            print(f"{strategy}, {options.tasks} tasks", file=sys.stderr)
            own = ["--folder", str(options.folder), "--tasks", str(options.tasks), "--one", strategy]
            subprocess.run([sys.executable, __file__, *own], check=True)
        rows += list(rows_of(place, strategy))
    results = None if options.no_write else Path(__file__).parent / "results"
    write([*rows, *others(rows, results)], results)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("graftory-growth"), help="keeps runs and adapters")
    parser.add_argument("--strategies", default=",".join(RATES))
    parser.add_argument("--tasks", type=int, default=max(POINTS), help="how many, 40 at most")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def folder_of(root: Path, strategy: str, tasks: int) -> Path:
    """A run's own."""
    return root / f"{strategy}-{tasks}"


def run_one(root: Path, strategy: str, tasks: int) -> None:
    """Run it from the start, and write down the CPU time at each phase."""
    clock: list[tuple[int, str, float]] = []

    def look(event: Event) -> None:
        clock.append((event.step, event.phase, time.process_time()))

    all_tasks = (*split_intents(root / "intents", 2), "wheel:sms", "wheel:disaster")
    sequence = TaskSequence(
        name="growth",
        base="wheel:minilm",
        tasks=all_tasks[-tasks:],
        strategy=strategy,
        options={"rank": 8, "targets": ["all"]},
        train={"batch_size": 8, "learning_rate": RATES[strategy], "head_learning_rate": 1e-2, "max_steps": 20},
        limits=Limits(train=200, test=40),
    )
    place = folder_of(root, strategy, tasks)
    if place.exists():
        raise SystemExit(f"{place} holds a run that was cut off, whose CPU time is not known; delete it")
    run_sequence(sequence, Hub.create(place / "hub"), place / "run", progress=look)
    clock.append((tasks + 1, "prepare", time.process_time()))
    (place / "clock.json").write_text(json.dumps(clock))


def rows_of(place: Path, strategy: str) -> Sequence[Row]:
    """The table's rows of one run."""
    report, run = load_report(place / "run"), RunFolder(place / "run")
    begins = {step: at for step, phase, at in json.loads((place / "clock.json").read_text()) if phase == "prepare"}
    points = [point for point in POINTS if point <= len(report.tasks)]
    return [row_of(report, run, begins, strategy, point) for point in points]


def row_of(report: Report, run: RunFolder, begins: dict[int, float], strategy: str, point: int) -> Row:
    """After so many tasks; a step's time is the mean over the last five."""
    row: Row = {
        "strategy": strategy,
        "tasks": point,
        "ACC": 100 * fmean(report.matrix[point - 1][:point]),
        "CPU s a step": (begins[point + 1] - begins[point - 4]) / 5,
        "stored, kB": sum(report.storage[point - 1].values()) / 1000,
    }
    if report.routing is not None:
        cells = [run.cell(point, j, "routed") for j in range(point)]
        own = [cell.routes.get(name, 0) for cell, name in zip(cells, report.tasks, strict=False) if cell is not None]
        row["routed ACC"] = 100 * fmean(value for value in report.routing.matrix[point - 1] if value is not None)
        row["right task"] = 100 * sum(own) / sum(cell.n for cell in cells if cell is not None)
    return row


def others(rows: Sequence[Row], results: Path | None) -> Sequence[Row]:
    """What the results have of strategies that were not asked for."""
    file = results / "continual_growth.json" if results else None
    known = json.loads(file.read_text())["rows"] if file and file.exists() else []
    return [row for row in known if row["strategy"] not in {each["strategy"] for each in rows}]


def write(rows: Sequence[Row], folder: Path | None) -> None:
    """Print the table, and write it with the figures and a picture."""
    rows = sorted(rows, key=lambda row: (list(RATES).index(row["strategy"]), row["tasks"]))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = [{key: _shown(row.get(key)) for key in columns} for row in rows]
    title = [
        "# As tasks become many",
        "",
        "`python benchmarks/continual_growth.py`; what is measured stands there.",
        "",
    ]
    text = "\n".join([*title, *table(shown)]) + "\n"
    Console().print(Markdown(text))
    if folder is None:
        return
    machine = {"system": platform.system(), "processor": platform.machine(), "libraries": library_versions()}
    (folder / "continual_growth.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    (folder / "continual_growth.md").write_text(text)
    draw(rows, folder / "continual_growth.png")


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracy, time and storage over the number of tasks."""
    from matplotlib.figure import Figure

    panels = {"ACC": "ACC, %", "CPU s a step": "CPU s a step", "stored, kB": "stored, kB"}
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for strategy in dict.fromkeys(row["strategy"] for row in rows):
            own = [row for row in rows if row["strategy"] == strategy]
            (line,) = axes.plot([row["tasks"] for row in own], [row[key] for row in own], "o-", label=strategy)
            if key == "ACC" and "routed ACC" in own[0]:
                values = [row["routed ACC"] for row in own]
                axes.plot([row["tasks"] for row in own], values, "o--", color=line.get_color(), label="… by the router")
        axes.set_xlabel("tasks")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if key != "ACC":
            axes.set_ylim(bottom=0)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
