"""The table and the picture of `methods.py`."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from graftory.versions import library_versions

PROBE = "linear probe"
Run = Mapping[str, Any]


def write_report(runs: Sequence[Run], tried: Mapping[str, Mapping[str, float]], folder: Path | None) -> None:
    """Print the table, and write it with the runs, the rates that were tried and a picture."""
    text = markdown(runs)
    Console().print(Markdown(text))
    if folder is None:
        return
    machine = {"system": platform.system(), "processor": platform.machine(), "libraries": library_versions()}
    data = {"machine": machine, "rates tried, held-out accuracy": tried, "runs": runs}
    (folder / "methods.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / "methods.md").write_text(text)
    draw(runs, folder / "methods.png")


def markdown(runs: Sequence[Run]) -> str:
    """The table, the best mean first; and which methods are below the linear probe."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    counts = {task: len({run["seed"] for run in runs if run["task"] == task}) for task in tasks}
    head = ["method", *tasks, "mean", "− probe", "learning rate", "numbers", "training, CPU s"]
    lines = ["# Every method on the same tasks", ""]
    seeds = ", ".join(f"{task}: {count}" for task, count in counts.items())
    lines += ["`python benchmarks/methods.py`; what is measured stands there. Accuracy in %, mean ± std over seeds"]
    lines += [f"({seeds}); `mean`: of the tasks' means."]
    lines += ["`− probe`: the mean difference to the linear probe on the same rows, ± its standard error.", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    ranked = sorted(methods_of(runs), key=lambda method: -overall(runs, method))
    for method in ranked:
        own = [run for run in runs if run["method"] == method]
        cells = [method, *(cell(own, task) for task in tasks), f"{overall(runs, method):.1f}", against(runs, method)]
        cells += [f"{own[0]['learning_rate']:.2g}", f"{statistics.median(run['numbers'] for run in own):,.0f}"]
        cells += [f"{statistics.mean(run['seconds'] for run in own):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def methods_of(runs: Sequence[Run]) -> list[str]:
    """In the order of the runs."""
    return list(dict.fromkeys(run["method"] for run in runs))


def overall(runs: Sequence[Run], method: str) -> float:
    """The mean of the tasks' mean accuracies, %."""
    own = [run for run in runs if run["method"] == method]
    tasks = {run["task"] for run in own}
    return statistics.mean(
        statistics.mean(100 * float(run["accuracy"]) for run in own if run["task"] == task) for task in tasks
    )


def cell(own: Sequence[Run], task: str) -> str:
    """Mean ± std of one task over seeds."""
    values = [100 * run["accuracy"] for run in own if run["task"] == task]
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def against(runs: Sequence[Run], method: str) -> str:
    """Mean difference to the linear probe on the same rows, points, ± standard error over tasks and seeds."""
    probe = {(run["task"], run["seed"]): run["accuracy"] for run in runs if run["method"] == PROBE}
    own = {(run["task"], run["seed"]): run["accuracy"] for run in runs if run["method"] == method}
    found = [100 * (own[key] - probe[key]) for key in own if key in probe]
    if method == PROBE or len(found) < 2:
        return "–"
    return f"{statistics.mean(found):+.1f} ± {statistics.stdev(found) / len(found) ** 0.5:.1f}"


def draw(runs: Sequence[Run], file: Path) -> None:
    """Mean accuracy by numbers that learn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for method in methods_of(runs):
        if method == PROBE:
            axes.axhline(overall(runs, method), color="grey", linestyle="--", linewidth=1, label=PROBE)
            continue
        numbers = statistics.median(run["numbers"] for run in runs if run["method"] == method)
        axes.scatter(numbers, overall(runs, method), s=24)
        axes.annotate(method, (numbers, overall(runs, method)), xytext=(4, 3), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("numbers that learn, without the head")
    axes.set_ylabel("accuracy, mean over tasks and seeds, %")
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=110)
    plt.close(figure)
