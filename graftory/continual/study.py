"""One sequence in several orders of its tasks and with several seeds: what is luck, and what is not."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import factorial
from pathlib import Path
from statistics import fmean, stdev

from graftory.continual.compare import mean_rows
from graftory.continual.files import read_json, write_atomically, write_json
from graftory.continual.report import Report, load_report
from graftory.continual.report_text import Block, compare_runs, markdown, page
from graftory.continual.runner import run_sequence
from graftory.continual.sequence import TaskSequence, read_sequence, resolved
from graftory.continual.state import Event
from graftory.errors import ConfigError
from graftory.hub import Hub
from graftory.schema import Json, decode
from graftory.training import processes

_FILE = "study.json"
_DRAWN = "orders"
"""Orders are drawn from this seed, whatever the runs' own: all strategies and seeds have the same."""


@dataclass(frozen=True, slots=True)
class StudyRun:
    """One of the runs."""

    folder: str
    """Below the study's."""
    order: tuple[int, ...]
    """Positions of the tasks in the file, from 1."""
    seed: int


@dataclass(frozen=True, slots=True)
class Study:
    """Runs of one sequence. All but the order of the tasks and the seed is the same in all of them."""

    sequence: TaskSequence
    orders: tuple[tuple[int, ...], ...] = ()
    """Positions of the tasks, from 1; none is the order of the sequence."""
    seeds: tuple[int, ...] = ()
    """None is the seed of the sequence."""

    def __post_init__(self) -> None:
        wanted = list(range(1, len(self.sequence.tasks) + 1))
        for order in self.orders:
            if sorted(order) != wanted:
                raise ConfigError(f"orders: got {list(order)}, wanted each of {wanted} once")
        for what, values in (("orders", self.orders), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ConfigError(f"{what}: one comes twice; give each once")

    @property
    def is_one(self) -> bool:
        """Whether it is the sequence itself and nothing else."""
        return not self.orders and not self.seeds

    def runs(self) -> tuple[StudyRun, ...]:
        """All combinations, orders first."""
        given = tuple(range(1, len(self.sequence.tasks) + 1))
        return tuple(
            StudyRun(f"order-{number}-seed-{seed}", order, seed)
            for number, order in enumerate(self.orders or (given,), 1)
            for seed in self.seeds or (self.sequence.seed,)
        )

    def sequence_of(self, run: StudyRun) -> TaskSequence:
        """The sequence of a run; its adapters have names of their own."""
        tasks = tuple(self.sequence.tasks[position - 1] for position in run.order)
        return replace(self.sequence, name=f"{self.sequence.name}-{run.folder}", tasks=tasks, seed=run.seed)


@dataclass(frozen=True, slots=True)
class Spread:
    """One number over the runs."""

    mean: float
    deviation: float | None
    """Standard deviation over the runs; None for a single one."""
    runs: int


@dataclass(frozen=True, slots=True)
class StudyReport:
    """What came of a study."""

    name: str
    strategy: str
    runs: tuple[StudyRun, ...]
    reports: tuple[Report, ...]
    spreads: dict[str, Spread]
    """ACC, BWT, ... by their names in `Summary`, and `routed_acc`, `regret` and `abstained` where a router chose."""


def load_study(path: str | Path) -> Study:
    """Read a sequence's YAML with `orders` and `seeds`: how many orders (the file's own, and others drawn), or lists of
    tasks as in `tasks`; and a list of seeds. Without them it is the one run.

    Raises:
        ConfigError: If it cannot be read, or a key is unknown, missing or ill-typed.
    """
    data = dict(read_sequence(path))
    orders, seeds = data.pop("orders", None), data.pop("seeds", None)
    sequence = decode(TaskSequence, data, str(path))
    if seeds is not None and "seed" in data:
        raise ConfigError(f"{path}: got both seed and seeds, wanted one of them")
    return Study(
        resolved(sequence, Path(path).parent),
        () if orders is None else _orders(orders, sequence.tasks, f"{path}.orders"),
        () if seeds is None else decode(tuple[int, ...], seeds, f"{path}.seeds"),
    )


def run_study(
    study: Study, hub: Hub, folder: str | Path, *, progress: Callable[[StudyRun, Event], None] | None = None
) -> StudyReport:
    """Run all of it, or go on where an earlier start was stopped; finished runs are only read.

    Args:
        study: What to run.
        hub: Where the adapters go.
        folder: Holds a folder for each run, and study.json, study.md and study.html.
        progress: Told of every phase of every run as it begins.

    Raises:
        ConfigError: If a run does not fit together, or its folder holds another one.
    """
    root, runs, reports = Path(folder), study.runs(), []
    if processes.is_first():
        write_json(root / _FILE, {"runs": [asdict(run) for run in runs]})
    for run in runs:

        def told(event: Event, run: StudyRun = run) -> None:
            if progress is not None:
                progress(run, event)

        reports.append(run_sequence(study.sequence_of(run), hub, root / run.folder, progress=told))
    report = StudyReport(study.sequence.name, study.sequence.strategy, runs, tuple(reports), spreads_of(reports))
    if processes.is_first():
        _write(report, root)
    return report


def run_folders(folder: Path) -> tuple[Path, ...]:
    """The folders of the runs of a study; of a run, its own."""
    if not (folder / _FILE).exists():
        return (folder,)
    return tuple(folder / run.folder for run in _runs(folder))


def load_reports(folders: Sequence[Path]) -> list[Report]:
    """The reports of finished runs, and of all runs of studies.

    Raises:
        DataError: If there is none.
    """
    return [load_report(run) for folder in folders for run in run_folders(folder)]


def spreads_of(reports: Sequence[Report]) -> dict[str, Spread]:
    """Mean and standard deviation over the runs of every number that all of them have."""
    rows: list[dict[str, float | None]] = []
    for report in reports:
        numbers: dict[str, float | None] = asdict(report.summary)
        if report.routing is not None:
            own = report.routing
            numbers |= {"routed_acc": own.acc, "regret": own.regret, "abstained": own.abstained}
        rows.append(numbers)
    found = {}
    for name in rows[0]:
        values = [value for row in rows if (value := row.get(name)) is not None]
        if len(values) == len(rows):
            found[name] = Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))
    return found


def _runs(folder: Path) -> tuple[StudyRun, ...]:
    data = read_json(folder / _FILE)
    return decode(tuple[StudyRun, ...], data["runs"], str(folder / _FILE))


def _orders(given: Json, tasks: Sequence[str], where: str) -> tuple[tuple[int, ...], ...]:
    if isinstance(given, int) and not isinstance(given, bool):
        return drawn_orders(given, len(tasks))
    places = {task: number for number, task in enumerate(tasks, 1)}
    orders = []
    for order in decode(tuple[tuple[str, ...], ...], given, where):
        if sorted(order) != sorted(tasks):
            raise ConfigError(f"{where}: got {', '.join(order)}, wanted the tasks of 'tasks', each once")
        orders.append(tuple(places[task] for task in order))
    return tuple(orders)


def drawn_orders(count: int, tasks: int) -> tuple[tuple[int, ...], ...]:
    """The order 1, 2, …, and others drawn at random, no two alike; the same for the same numbers.

    Raises:
        ConfigError: If there are not so many.
    """
    if not 1 <= count <= factorial(tasks):
        raise ConfigError(f"orders: got {count}, wanted 1 to {factorial(tasks)} for {tasks} tasks")
    generator, found = random.Random(f"{_DRAWN}/{tasks}"), {tuple(range(1, tasks + 1)): None}
    while len(found) < count:
        found[tuple(generator.sample(range(1, tasks + 1), tasks))] = None
    return tuple(found)


def _write(report: StudyReport, root: Path) -> None:
    summary = {"runs": report.runs, "name": report.name, "strategy": report.strategy, "spreads": report.spreads}
    write_json(root / _FILE, summary)
    blocks = [
        Block("Means ± standard deviation", rows=mean_rows(report.reports)),
        Block("Runs", rows=compare_runs(report.reports)),
    ]
    title = f"{report.name}: {report.strategy}, {len(report.runs)} runs"
    write_atomically(root / "study.md", markdown(title, blocks).encode())
    write_atomically(root / "study.html", page(title, blocks, {}).encode())
