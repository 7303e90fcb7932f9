"""The tables and the picture of `composition.py`."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from graftory.versions import library_versions

REFERENCE = "fresh adapter"
Run = Mapping[str, Any]
Key = tuple[str, int, int]


def write_report(runs: Sequence[Run], order: Sequence[str], command: str, folder: Path | None, file: str) -> None:
    """Print the tables, and write them with the runs and a picture."""
    methods = [method for method in order if any(run["method"] == method for run in runs)]
    text = markdown(runs, methods, command)
    Console().print(Markdown(text))
    if folder is None:
        return
    machine = {"system": platform.system(), "processor": platform.machine(), "libraries": library_versions()}
    data = {"machine": machine, "runs": sorted(runs, key=lambda r: (r["target"], r["size"], r["seed"], r["method"]))}
    (folder / f"{file}.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / f"{file}.md").write_text(text)
    draw(runs, methods, folder / f"{file}.png")


def markdown(runs: Sequence[Run], methods: Sequence[str], command: str) -> str:
    """All tables."""
    sizes = sorted({run["size"] for run in runs})
    targets = sorted({run["target"] for run in runs})
    lines = ["# Composing adapters for a new task with few rows", ""]
    lines += [
        f"`{command}`; what is measured stands there. Accuracy in %, mean ± std over seeds.",
        "",
    ]
    lines += [f"Seeds: {', '.join(str(seed) for seed in sorted({run['seed'] for run in runs}))}.", ""]
    lines += [f"Answering: CPU time of the test rows, {REFERENCE} = 1.", "", "## Mean over targets", ""]
    head = ["method", *(f"{n} rows" for n in sizes), "trained numbers", "training, CPU s", "answering"]
    lines += table(head, [
        [
            method,
            *(overall(runs, method, size) for size in sizes),
            f"{statistics.median(r['parameters'] for r in runs if r['method'] == method):,.0f}",
            f"{statistics.median(r['seconds'] for r in runs if r['method'] == method):.1f}",
            answering(runs, method),
        ]
        for method in methods
    ])  # fmt: skip
    if REFERENCE in methods:
        lines += ["", f"## Paired difference to a {REFERENCE}", ""]
        lines += [
            "Points, mean ± standard error over targets and seeds; * where it is more than two of them from 0.",
            "",
        ]
        lines += table(
            ["method", *(f"{n} rows" for n in sizes)],
            [[m, *(paired(runs, m, size) for size in sizes)] for m in methods if m != REFERENCE],
        )
    for target in targets:
        some = [run for run in runs if run["target"] == target]
        lines += ["", f"## {target}", ""]
        lines += table(
            ["method", *(f"{n} rows" for n in sizes)], [[m, *(spread(some, m, n) for n in sizes)] for m in methods]
        )
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of markdown."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def accuracies(runs: Sequence[Run], method: str, size: int) -> dict[Key, float]:
    """In %, by what is paired."""
    return {key_of(run): 100 * run["accuracy"] for run in runs if run["method"] == method and run["size"] == size}


def overall(runs: Sequence[Run], method: str, size: int) -> str:
    """The mean over targets, and the deviation of these means over seeds."""
    by_seed: dict[int, list[float]] = {}
    for (_, _, seed), value in accuracies(runs, method, size).items():
        by_seed.setdefault(seed, []).append(value)
    return _mean_and_spread([statistics.fmean(values) for values in by_seed.values()])


def answering(runs: Sequence[Run], method: str) -> str:
    """CPU time of answering the test rows, as a multiple of the reference's in the same target, size and seed."""
    mine, theirs = (
        {key_of(run): run["answering"] for run in runs if run["method"] == name and run["answering"] is not None}
        for name in (method, REFERENCE)
    )
    ratios = [mine[key] / theirs[key] for key in mine.keys() & theirs.keys()]
    return f"{statistics.median(ratios):.2f}" if ratios else "–"


def key_of(run: Run) -> Key:
    """What is paired."""
    return run["target"], run["size"], run["seed"]


def spread(runs: Sequence[Run], method: str, size: int) -> str:
    """The mean and deviation over seeds."""
    return _mean_and_spread(list(accuracies(runs, method, size).values()))


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def paired(runs: Sequence[Run], method: str, size: int) -> str:
    """The mean difference to the reference, run by run."""
    mine, theirs = accuracies(runs, method, size), accuracies(runs, REFERENCE, size)
    differences = [mine[key] - theirs[key] for key in mine.keys() & theirs.keys()]
    if len(differences) < 2:
        return "-"
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.1f} ± {error:.1f}{' *' if abs(mean) > 2 * error else ''}"


def draw(runs: Sequence[Run], methods: Sequence[str], path: Path) -> None:
    """Accuracy over rows, a panel for each target."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    targets, sizes = sorted({run["target"] for run in runs}), sorted({run["size"] for run in runs})
    figure, axes = pyplot.subplots(1, len(targets), figsize=(4 * len(targets), 4), sharey=True, squeeze=False)
    colours = mpl.colormaps["tab20"]
    for panel, target in zip(axes[0], targets, strict=True):
        some = [run for run in runs if run["target"] == target]
        for number, method in enumerate(methods):
            means = [statistics.fmean(accuracies(some, method, n).values() or [math.nan]) for n in sizes]
            plain = method in (REFERENCE, "linear probe", "full fine-tuning")
            panel.plot(sizes, means, marker="o", ms=3, color=colours(number), label=method, ls="--" if plain else "-")
        panel.set(title=target, xscale="log", xlabel="rows")
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy, %")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
