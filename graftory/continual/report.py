"""What came of a run: report.json for programs, report.md for people, a heat map for both ways of routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graftory.continual.evaluation import ABSTAINED
from graftory.continual.files import read_json, write_atomically, write_json
from graftory.continual.metrics import Summary, summarise
from graftory.continual.sequence import TaskSequence
from graftory.continual.state import Cell, Commit, RunFolder, Way
from graftory.continual.strategies import Strategy
from graftory.errors import DataError
from graftory.schema import decode


@dataclass(frozen=True, slots=True)
class Routing:
    """What the router did at the end, beside the id given."""

    matrix: tuple[tuple[float | None, ...], ...]
    """R with the router; None where a task is not learnt yet."""
    acc: float
    """Mean over all tasks at the end."""
    regret: float
    """ACC with the id given − ACC with the router."""
    id_accuracy: float
    """Share of all rows sent to their own task."""
    abstained: float
    """Share of all rows sent to the bare base."""
    confusion: tuple[tuple[int, ...], ...]
    """Rows of each task (down) sent to each task and, last, to the base (across)."""


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task of a run."""

    name: str
    metric: str
    untrained: float
    """b_j: the bare base with an untrained head."""
    train_rows: int
    test_rows: int
    ref: str
    """The version that learnt it."""


@dataclass(frozen=True, slots=True)
class Report:
    """A finished run."""

    name: str
    strategy: str
    base: str
    results: tuple[TaskResult, ...]
    matrix: tuple[tuple[float, ...], ...]
    """R with the id given."""
    summary: Summary
    routing: Routing | None
    """None where the strategy has nothing to route, or a metric is no mean over rows."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks in order."""
        return tuple(result.name for result in self.results)


def make_report(sequence: TaskSequence, strategy: Strategy, tasks: Sequence[str], folder: RunFolder) -> Report:
    """Gather a run from its folder; nothing is measured.

    Raises:
        DataError: If the run is not finished.
    """
    commits = folder.commits()
    if len(commits) < len(tasks):
        raise DataError(f"{folder.root}: {len(commits)} of {len(tasks)} tasks are learnt; run the sequence to its end")
    numbers = range(len(tasks))
    matrix = tuple(tuple(_value(_cell(folder, i + 1, j, "oracle")) for j in numbers) for i in numbers)
    results = tuple(_result(commit, _cell(folder, 0, j, "oracle")) for j, commit in enumerate(commits))
    summary = summarise(matrix, untrained=[result.untrained for result in results])
    return Report(
        name=sequence.name,
        strategy=strategy.name,
        base=sequence.base,
        results=results,
        matrix=matrix,
        summary=summary,
        routing=_routing(tasks, folder, summary.acc) if strategy.routable else None,
    )


def load_report(folder: str | Path) -> Report:
    """Read the report of a finished run.

    Raises:
        DataError: If there is none.
        ConfigError: If it has another form.
    """
    path = Path(folder) / "report.json"
    return decode(Report, read_json(path), str(path))


def compare_runs(reports: Sequence[Report]) -> list[dict[str, str]]:
    """A table of runs: one row per run and way to know the task, values ready to print, – where there is none."""
    rows = []
    for report in reports:
        summary = report.summary
        row = {"run": report.name, "strategy": report.strategy, "task id": "given", **_numbers(summary)}
        rows.append(row)
        if report.routing is not None:
            routed = {**dict.fromkeys(row, "–"), "run": report.name, "strategy": report.strategy, "task id": "router"}
            numbers = {
                "ACC": percent(report.routing.acc),
                "regret": points(report.routing.regret),
                "right task": percent(report.routing.id_accuracy),
            }
            rows.append({**routed, **numbers})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [{column: row.get(column, "–") for column in columns} for row in rows]


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md and the heat maps."""
    from graftory.continual.heatmap import Panel, draw_heatmaps

    write_json(folder / "report.json", report)
    pictures = {"oracle": _title(report, "task id given")}
    write_atomically(
        folder / "heatmap-oracle.png", draw_heatmaps([Panel(pictures["oracle"], report.matrix)], report.tasks)
    )
    if report.routing is not None:
        pictures["routed"] = _title(report, "Mahalanobis router")
        image = draw_heatmaps([Panel(pictures["routed"], report.routing.matrix)], report.tasks)
        write_atomically(folder / "heatmap-routed.png", image)
    write_atomically(folder / "report.md", markdown(report, pictures).encode())


def markdown(report: Report, pictures: Mapping[str, str]) -> str:
    """The report as people read it."""
    lines = [
        f"# {report.name}: {report.strategy} on {report.base}",
        "",
        *_table(compare_runs([report])),
        "",
        "Scores in %, differences in points. Formulas: docs/continual.md.",
        "",
        "## Tasks",
        "",
        *_table(
            [
                {
                    "task": result.name,
                    "metric": result.metric,
                    "training rows": str(result.train_rows),
                    "test rows": str(result.test_rows),
                    "untrained": percent(result.untrained),
                    "after its training": percent(report.matrix[j][j]),
                    "at the end": percent(report.matrix[-1][j]),
                    **({} if report.routing is None else {"routed": _percent_or_dash(report.routing.matrix[-1][j])}),
                    "adapter": result.ref,
                }
                for j, result in enumerate(report.results)
            ]
        ),
    ]
    if report.routing is not None:
        lines += ["", "## Where the router sent the rows", "", *_table(_confusion_rows(report, report.routing))]
    for way, title in pictures.items():
        lines += ["", f"![{title}](heatmap-{way}.png)"]
    return "\n".join([*lines, ""])


def percent(value: float) -> str:
    """0.8075 as 80.8."""
    return f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """A difference in points, with its sign; exactly 0 is told apart from what rounds to it."""
    if value is None:
        return "–"
    return "0" if value == 0 else f"{100 * value:+.2f}"


def _result(commit: Commit, untrained: Cell) -> TaskResult:
    return TaskResult(
        name=commit.task,
        metric=untrained.metric,
        untrained=_value(untrained),
        train_rows=commit.train_rows,
        test_rows=commit.test_rows,
        ref=commit.ref,
    )


def _numbers(summary: Summary) -> dict[str, str]:
    return {
        "ACC": percent(summary.acc),
        "AAA": percent(summary.aaa),
        "BWT": points(summary.bwt),
        "forgetting": points(summary.forgetting),
        "FWT": points(summary.fwt),
    }


def _routing(tasks: Sequence[str], folder: RunFolder, oracle: float) -> Routing | None:
    numbers = range(len(tasks))
    matrix = tuple(tuple(_cell(folder, i + 1, j, "routed").value if j <= i else None for j in numbers) for i in numbers)
    last = [value for value in matrix[-1] if value is not None]
    if len(last) < len(tasks):
        return None
    cells = [_cell(folder, len(tasks), j, "routed") for j in numbers]
    confusion = tuple(tuple(cell.routes.get(name, 0) for name in (*tasks, ABSTAINED)) for cell in cells)
    total = sum(cell.n for cell in cells)
    acc = sum(last) / len(last)
    return Routing(
        matrix=matrix,
        acc=acc,
        regret=oracle - acc,
        id_accuracy=sum(row[j] for j, row in enumerate(confusion)) / total,
        abstained=sum(row[-1] for row in confusion) / total,
        confusion=confusion,
    )


def _confusion_rows(report: Report, routing: Routing) -> list[dict[str, str]]:
    names = (*report.tasks, "base (abstained)")
    return [
        {"rows of": task, **{name: str(count) for name, count in zip(names, counts, strict=True)}}
        for task, counts in zip(report.tasks, routing.confusion, strict=True)
    ]


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    head = list(rows[0])
    body = ["| " + " | ".join(row[column] for column in head) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body]


def _title(report: Report, way: str) -> str:
    return f"{report.name} ({report.strategy}), {way}"


def _percent_or_dash(value: float | None) -> str:
    return "–" if value is None else percent(value)


def _cell(folder: RunFolder, step: int, task: int, way: Way) -> Cell:
    cell = folder.cell(step, task, way)
    if cell is None:
        raise DataError(f"{folder.root}: the {way} score of task {task + 1} after step {step} is missing; run it again")
    return cell


def _value(cell: Cell) -> float:
    if cell.value is None:
        raise DataError(f"the {cell.way} score of task {cell.task + 1} after step {cell.step} has no value")
    return cell.value
