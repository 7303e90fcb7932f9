"""What came of a run, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graftory.continual.evaluation import ABSTAINED
from graftory.continual.files import read_json
from graftory.continual.general import General, general_of
from graftory.continual.metrics import Summary, summarise
from graftory.continual.sequence import TaskSequence
from graftory.continual.state import Cell, Commit, RunFolder, Way
from graftory.continual.strategies import Scenario, Strategy
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
class Rejection:
    """A step that the gate rejected."""

    step: int
    task: str
    ref: str
    """Its version, which is kept."""
    fell: str
    """The old task that fell most."""
    drop: float
    """By how much, against the last accepted step; in shares of 1."""
    scores: tuple[float, ...]
    """What it would have been, on all tasks."""


@dataclass(frozen=True, slots=True)
class Report:
    """A finished run."""

    name: str
    strategy: str
    base: str
    results: tuple[TaskResult, ...]
    matrix: tuple[tuple[float, ...], ...]
    """R with the id given. After a rejected step, what the last accepted one answers."""
    summary: Summary
    routing: Routing | None
    """None where the strategy has nothing to route, or a metric is no mean over rows."""
    scenario: Scenario = "task"
    seed: int = 0
    storage: tuple[Mapping[str, int], ...] = ()
    """Bytes stored after each step, by what they are."""
    max_drop: float | None = None
    """δ of the gate, if there was one."""
    rejected: tuple[Rejection, ...] = ()
    losses: tuple[tuple[float, ...], ...] = ()
    """Of language models: loss on each task after each step, in nats per token of the answers; as `matrix`."""
    general: General | None = None
    """The probe: what became of the base's own ability; None where there was none."""
    routable: bool = False
    """Whether the strategy's adapters are found by their task's id, or by a router."""

    @property
    def id_known(self) -> bool:
        """Whether `matrix` is measured with the task's id given."""
        return self.scenario == "task" or self.routable or self.routing is not None

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
    in_force = tuple(max(c.step for c in commits[: i + 1] if c.accepted) for i in numbers)
    matrix = tuple(tuple(_value(_cell(folder, step, j, "oracle")) for j in numbers) for step in in_force)
    results = tuple(_result(commit, _cell(folder, 0, j, "oracle")) for j, commit in enumerate(commits))
    summary = summarise(matrix, untrained=[result.untrained for result in results])
    return Report(
        name=sequence.name,
        strategy=sequence.strategy,
        base=sequence.base,
        results=results,
        matrix=matrix,
        summary=summary,
        routing=_routing(tasks, folder, in_force, summary.acc) if strategy.routable else None,
        scenario=sequence.scenario,
        seed=sequence.seed,
        storage=tuple(commit.stored for commit in commits),
        max_drop=sequence.max_drop,
        losses=_losses(folder, in_force, len(tasks)),
        general=general_of(folder, in_force),
        routable=strategy.routable,
        rejected=tuple(_rejection(commit, len(tasks), folder) for commit in commits if not commit.accepted),
    )


def load_report(folder: str | Path) -> Report:
    """Read the report of a finished run.

    Raises:
        DataError: If there is none.
        ConfigError: If it has another form.
    """
    path = Path(folder) / "report.json"
    return decode(Report, read_json(path), str(path))


def _result(commit: Commit, untrained: Cell) -> TaskResult:
    return TaskResult(
        name=commit.task,
        metric=untrained.metric,
        untrained=_value(untrained),
        train_rows=commit.train_rows,
        test_rows=commit.test_rows,
        ref=commit.ref,
    )


def _rejection(commit: Commit, tasks: int, folder: RunFolder) -> Rejection:
    # tasks appended since were not measured on it
    cells = (folder.cell(commit.step, j, "oracle") for j in range(tasks))
    scores = tuple(_value(cell) for cell in cells if cell is not None)
    return Rejection(commit.step, commit.task, commit.ref, commit.fell, commit.drop, scores)


def _losses(folder: RunFolder, in_force: Sequence[int], tasks: int) -> tuple[tuple[float, ...], ...]:
    rows = [[_cell(folder, step, j, "oracle").loss for j in range(tasks)] for step in in_force]
    known = tuple(tuple(loss for loss in row if loss is not None) for row in rows)
    return known if all(len(row) == tasks for row in known) else ()


def _routing(tasks: Sequence[str], folder: RunFolder, in_force: Sequence[int], oracle: float) -> Routing | None:
    numbers = range(len(tasks))
    matrix = tuple(
        tuple(_cell(folder, step, j, "routed").value if j <= i else None for j in numbers)
        for i, step in enumerate(in_force)
    )
    last = [value for value in matrix[-1] if value is not None]
    if len(last) < len(tasks):
        return None
    cells = [_cell(folder, in_force[-1], j, "routed") for j in numbers]
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


def _cell(folder: RunFolder, step: int, task: int, way: Way) -> Cell:
    cell = folder.cell(step, task, way)
    if cell is None:
        raise DataError(f"{folder.root}: the {way} score of task {task + 1} after step {step} is missing; run it again")
    return cell


def _value(cell: Cell) -> float:
    if cell.value is None:
        raise DataError(f"the {cell.way} score of task {cell.task + 1} after step {cell.step} has no value")
    return cell.value
