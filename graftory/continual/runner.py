"""Run a sequence of tasks: PREPARE, TRAIN, CONSOLIDATE, EVAL, COMMIT for each, resumable between tasks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from graftory.adapter import TASK_SOURCE, Adapter, Metric, check_name
from graftory.adapters import new_adapter
from graftory.continual.evaluation import TestSet, oracle_cell, routed_cell
from graftory.continual.freeze import must_stay
from graftory.continual.report import Report, make_report, write_report
from graftory.continual.router import Router, check_names
from graftory.continual.router_file import load_router, save_router
from graftory.continual.sequence import TaskSequence
from graftory.continual.state import Cell, Commit, Event, Phase, RunFolder
from graftory.continual.strategies import Answer, Context, Plan, Step, Strategy, strategy_of
from graftory.data import Rows, TaskFile, load_rows, load_task
from graftory.errors import ConfigError, CorruptAdapterError
from graftory.hub import Hub
from graftory.schema import decode
from graftory.training import LoadedBase, TrainSettings, load_base, train
from graftory.training.features import features_of

Progress = Callable[[Event], None]
_HELD_OUT = 5
"""Every fifth row of what the router looks at is kept apart, for its bound."""
_SCORES = ("accuracy", "f1", "matthews", "pearson", "spearman", "exact_match")
"""Metrics where more is better and 1 is best, so that the matrix can be read and averaged."""
_FAMILIES = {"classification": "classification", "regression": "classification"}
"""Kinds that share a model class; the others stand alone."""


def run_sequence(sequence: TaskSequence, hub: Hub, folder: str | Path, *, progress: Progress | None = None) -> Report:
    """Learn the tasks one after another; or go on where an earlier run in the folder was stopped.

    Every step becomes a version in the hub. A step that was not committed is done again from its start (or
    from the trainer's own checkpoint) and gives the same adapter, as all seeds follow from (seed, task, phase).

    Args:
        sequence: What to learn, and how.
        hub: Where the adapters go.
        folder: The run's own folder: state, matrix, report, pictures.
        progress: Told of every phase as it begins.

    Returns:
        The report, which is also in the folder as report.json and report.md.

    Raises:
        ConfigError: If the sequence does not fit together, or the folder holds another one.
        CorruptAdapterError: If something frozen changed.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    with _only_one(root):
        return _Run(sequence, hub, RunFolder(root), progress).all()


@dataclass
class _Run:
    """One start of a run. All state that outlives it is in the folder and the hub."""

    sequence: TaskSequence
    hub: Hub
    folder: RunFolder
    progress: Progress | None
    features: dict[int, Tensor] = field(default_factory=dict)
    """Features of the test rows, by position."""

    @cached_property
    def strategy(self) -> Strategy:
        return strategy_of(self.sequence.strategy)

    @cached_property
    def tasks(self) -> tuple[TaskFile, ...]:
        tasks = tuple(load_task(source) for source in self.sequence.tasks)
        check_names([_slug(task) for task in tasks])
        families = sorted({_FAMILIES.get(task.kind, task.kind) for task in tasks})
        if len(families) > 1:
            raise ConfigError(f"tasks of kinds {', '.join(families)} need different models; make a sequence of each")
        for task in tasks:
            if task.metric not in _SCORES:
                raise ConfigError(
                    f"task {task.name!r}: metric {task.metric} has no best value of 1; in a sequence use one of "
                    f"{', '.join(_SCORES)}"
                )
            check_name(f"{self.sequence.name}-{_slug(task)}")
        return tasks

    @cached_property
    def tests(self) -> tuple[TestSet, ...]:
        limit, seed = self.sequence.limits.test, self.sequence.seed
        return tuple(TestSet(task, load_rows(task, "test", limit=limit, seed=seed)) for task in self.tasks)

    @cached_property
    def loaded(self) -> LoadedBase:
        return load_base(self.sequence.base, self.tasks[0].kind)

    @cached_property
    def untrained(self) -> dict[str, Adapter]:
        config, loaded = self.sequence.config(), self.loaded
        return {
            _slug(test.task): new_adapter(loaded.model, config, task=test.rows.info(test.task), base=loaded.base)
            for test in self.tests
        }

    def all(self) -> Report:
        _ = self.strategy, self.tasks, self._settings("")  # all that can be wrong is wrong before training
        self.folder.open(self.sequence)
        commits = self.folder.commits()
        if len(commits) < len(self.tasks):
            done = tuple(self._restored(commit) for commit in commits)
            self._baselines(done)
            for number in range(1, len(done) + 1):  # tasks appended since then
                self._fill(number, done[:number])
            for position in range(len(commits), len(self.tasks)):
                done = (*done, self._step(position, done))
        report = make_report(self.sequence, self.strategy, [_slug(task) for task in self.tasks], self.folder)
        write_report(report, self.folder.root)
        return report

    def _restored(self, commit: Commit) -> Step:
        record = self.hub.record(commit.ref)
        if record.digest != commit.digest:
            raise CorruptAdapterError(
                f"{commit.ref} is not what step {commit.step} of this run made; give the hub it was run with"
            )
        return Step(commit.task, commit.ref, commit.digest, self.hub.get(commit.ref))

    def _baselines(self, done: tuple[Step, ...]) -> None:
        """b_j: the bare base with an untrained head, measured once."""
        context = replace(self._context(done), done=())
        missing = [j for j in range(len(self.tests)) if self.folder.cell(0, j, "oracle") is None]
        for j in missing:
            self._begin(0, _slug(self.tests[j].task), "eval")
            answer = self.strategy.answer(context, _slug(self.tests[j].task))
            self.folder.put_cell(oracle_cell(self.loaded, 0, j, self.tests[j], answer, self.sequence.eval_batch_size))

    def _step(self, position: int, done: tuple[Step, ...]) -> Step:
        number, task = position + 1, self.tasks[position]
        name = _slug(task)
        self._begin(number, name, "prepare")
        rows = load_rows(task, "train", limit=self.sequence.limits.train, seed=self.sequence.seed)
        plan = self.strategy.before_task(self._context(done), name)
        old = {step.ref: step.adapter.tensors for step in done}
        with must_stay(self.loaded.model, old) as frozen:
            self._begin(number, name, "train")
            adapter = self._trained(number, task, rows, plan)
            self._begin(number, name, "consolidate")
            router = self._router(name, rows)
            self._begin(number, name, "eval")
            seen = (*done, Step(name, f"{plan.name} (in progress)", "", adapter))
            own = self._measure(number, seen, router)
        self._begin(number, name, "commit")
        metric = Metric(own.metric, own.value if own.value is not None else 0.0, name, "test", own.n)
        adapter = Adapter(replace(adapter.spec, metrics=(metric,)), adapter.tensors)
        ref = str(self.hub.put(plan.name, adapter))
        digest = self.hub.record(ref).digest
        self.folder.commit(Commit(number, name, ref, digest, frozen, len(rows), own.n))
        shutil.rmtree(self.folder.work(number), ignore_errors=True)
        return Step(name, ref, digest, adapter)

    def _trained(self, number: int, task: TaskFile, rows: Rows, plan: Plan) -> Adapter:
        settings = self._settings(_slug(task))
        adapter = train(
            self.loaded,
            task,
            rows,
            plan.start.spec.config,
            settings,
            name=plan.name,
            output_dir=self.folder.work(number),
            init=plan.start,
        )
        made = adapter.spec.lineage
        parameters = {**made.parameters, "run": self.sequence.name, "step": number, "strategy": self.strategy.name}
        parameters[TASK_SOURCE] = self.sequence.tasks[number - 1]
        lineage = replace(made, process="continual", parents=plan.parents, parameters=parameters)
        return Adapter(replace(adapter.spec, lineage=lineage), adapter.tensors)

    def _settings(self, task: str) -> TrainSettings:
        if "seed" in self.sequence.train:
            raise ConfigError("train.seed: the seeds of all tasks follow from the sequence's own 'seed'; set that")
        return decode(TrainSettings, {**self.sequence.train, "seed": self.sequence.seed_of(task, "train")}, "train")

    def _router(self, name: str, rows: Rows) -> Router | None:
        """The router with this task added; from the folder if that was done before the run was stopped."""
        if not self.strategy.routable:
            return None
        path = self.folder.router
        router = load_router(path) if path.exists() else Router(self.sequence.router)
        if name in router.names:
            return router
        limit = self.sequence.limits.router
        some = rows if limit is None else rows.subsample(limit, self.sequence.seed_of(name, "router"))
        features = features_of(self.loaded, some.texts, batch_size=self.sequence.eval_batch_size)
        held_out = [i for i in range(len(some)) if i % _HELD_OUT == _HELD_OUT - 1]
        fitted = [i for i in range(len(some)) if i % _HELD_OUT != _HELD_OUT - 1]
        router = router.add(name, features[fitted], features[held_out])
        save_router(router, path)
        return router

    def _measure(self, number: int, seen: tuple[Step, ...], router: Router | None) -> Cell:
        """Measure row `number` of the matrix; returns the cell of the task just learnt."""
        answers = self._fill(number, seen)
        for j in range(number):
            if router is not None and self.folder.cell(number, j, "routed") is None:
                features, size = self._test_features(j), self.sequence.eval_batch_size
                self.folder.put_cell(routed_cell(self.loaded, number, j, self.tests, answers, router, features, size))
        own = self.folder.cell(number, number - 1, "oracle")
        assert own is not None
        return own

    def _test_features(self, position: int) -> Tensor:
        if position not in self.features:
            texts = self.tests[position].rows.texts
            self.features[position] = features_of(self.loaded, texts, batch_size=self.sequence.eval_batch_size)
        return self.features[position]

    def _fill(self, number: int, seen: tuple[Step, ...]) -> dict[str, Answer]:
        """Measure what is missing of a row with the id given; returns what answers each task."""
        context = self._context(seen)
        answers = {name: self.strategy.answer(context, name) for name in context.tasks}
        for j, answer in enumerate(answers.values()):
            if self.folder.cell(number, j, "oracle") is None:
                self.folder.put_cell(self._oracle(number, j, answer))
        return answers

    def _oracle(self, number: int, position: int, answer: Answer) -> Cell:
        """A task measured with its id given; a task that no adapter answers yet keeps its untrained value."""
        before = self.folder.cell(0, position, "oracle")
        if answer.body is None and before is not None:
            return replace(before, step=number, copied=True)
        return oracle_cell(self.loaded, number, position, self.tests[position], answer, self.sequence.eval_batch_size)

    def _context(self, done: tuple[Step, ...]) -> Context:
        return Context(self.sequence.name, tuple(_slug(task) for task in self.tasks), self.untrained, done)

    def _begin(self, step: int, task: str, phase: Phase) -> None:
        event = self.folder.log(Event(step, task, phase))
        if self.progress is not None:
            self.progress(event)


def _slug(task: TaskFile) -> str:
    """A task's name as part of an adapter's name."""
    return task.name.replace("/", "-")


@contextmanager
def _only_one(root: Path) -> Iterator[None]:
    try:
        with FileLock(root / ".lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(f"another run is at work in {root}; wait for it, or give another folder") from None
