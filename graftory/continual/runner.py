"""Run a sequence of tasks: PREPARE, TRAIN, CONSOLIDATE, EVAL, COMMIT for each, resumable between tasks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from filelock import FileLock, Timeout

from graftory.adapter import TASK_SOURCE, Adapter, Metric, check_name
from graftory.adapters import new_adapter
from graftory.adapters.smop import smop_config
from graftory.config import SmopConfig
from graftory.continual.capability import check_capability, check_labels
from graftory.continual.evaluation import TestSet, oracle_cell
from graftory.continual.freeze import must_stay
from graftory.continual.ledger import stored_bytes
from graftory.continual.measuring import Measuring
from graftory.continual.report import Report, make_report
from graftory.continual.report_files import write_report
from graftory.continual.router import check_names
from graftory.continual.router_fit import fit_router
from graftory.continual.sequence import TaskSequence
from graftory.continual.state import Commit, Event, Phase, RunFolder
from graftory.continual.strategies import NOTHING, Context, Kept, Lesson, Plan, Step, Strategy, strategy_of
from graftory.data import Rows, TaskFile, load_rows, load_task
from graftory.errors import ConfigError, CorruptAdapterError
from graftory.hub import Hub
from graftory.schema import decode
from graftory.training import LoadedBase, TrainSettings, load_base
from graftory.training.company import Learnt
from graftory.training.train import train_in_company

Progress = Callable[[Event], None]
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

    @cached_property
    def strategy(self) -> Strategy:
        strategy = strategy_of(self.sequence.strategy, self.sequence.parameters)
        check_capability(self.sequence, strategy.needs)
        return strategy

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
        if isinstance(config, SmopConfig):
            config = smop_config(loaded.model, config)
        return {
            _slug(test.task): new_adapter(loaded.model, config, task=test.rows.info(test.task), base=loaded.base)
            for test in self.tests
        }

    @cached_property
    def measuring(self) -> Measuring:
        return Measuring(self.loaded, self.tests, self.strategy, self.folder, self.sequence.eval_batch_size)

    def all(self) -> Report:
        _ = self.strategy, self.tasks, self._settings("")  # all that can be wrong is wrong before training
        commits = self.folder.commits()
        if len(commits) < len(self.tasks):
            check_labels(self.sequence.scenario, [test.rows.info(test.task) for test in self.tests])
        self.folder.open(self.sequence)
        if len(commits) < len(self.tasks):
            self._learn(commits)
        tasks = [_slug(task) for task in self.tasks]
        report = make_report(self.sequence, self.strategy, tasks, self.folder)
        write_report(report, self.folder.root)
        return report

    def _learn(self, commits: list[Commit]) -> None:
        done = tuple(self._restored(commit) for commit in commits)
        self._baselines()
        kept = NOTHING
        for number, commit in enumerate(commits, 1):
            kept = self.folder.kept(commit)
            self.measuring.fill(number, self._context(done[:number], kept))  # tasks appended since then
        for position in range(len(commits), len(self.tasks)):
            step, kept = self._step(position, done, kept)
            done = (*done, step)

    def _restored(self, commit: Commit) -> Step:
        record = self.hub.record(commit.ref)
        if record.digest != commit.digest:
            raise CorruptAdapterError(
                f"{commit.ref} is not what step {commit.step} of this run made; give the hub it was run with"
            )
        return Step(commit.task, commit.ref, commit.digest, self.hub.get(commit.ref))

    def _baselines(self) -> None:
        """b_j: the bare base with an untrained head, measured once."""
        context = self._context((), NOTHING)
        missing = [j for j in range(len(self.tests)) if self.folder.cell(0, j, "oracle") is None]
        for j in missing:
            self._begin(0, _slug(self.tests[j].task), "eval")
            answer = self.strategy.answer(context, _slug(self.tests[j].task))
            self.folder.put_cell(oracle_cell(self.loaded, 0, j, self.tests[j], answer, self.sequence.eval_batch_size))

    def _step(self, position: int, done: tuple[Step, ...], kept: Kept) -> tuple[Step, Kept]:
        number, task = position + 1, self.tasks[position]
        name = _slug(task)
        old = {step.ref: step.adapter.tensors for step in done}
        with must_stay(self.loaded.model, old) as frozen:
            self._begin(number, name, "prepare")
            lesson = self._lesson(task, self._context(done, kept))
            plan = self.strategy.prepare(lesson)
            self._begin(number, name, "train")
            learnt = self._trained(lesson, plan)
            self._begin(number, name, "consolidate")
            finished = self.strategy.finish(lesson, learnt)
            kept_hash = self.folder.put_kept(number, finished.kept)
            path = self.folder.router
            routed = self.strategy.routable
            router = fit_router(self.sequence, self.loaded, path, name, lesson.rows) if routed else None
            self._begin(number, name, "eval")
            seen = (*done, Step(name, f"{plan.name} (in progress)", "", finished.adapter))
            context = self._context(seen, finished.kept)
            own = self.measuring.row(number, context, router)
        self._begin(number, name, "commit")
        metric = Metric(own.metric, own.value if own.value is not None else 0.0, name, "test", own.n)
        adapter = replace(finished.adapter, spec=replace(finished.adapter.spec, metrics=(metric,)))
        ref = str(self.hub.put(plan.name, adapter))
        digest = self.hub.record(ref).digest
        stored = stored_bytes(self.strategy, context, path if routed else None)
        self.folder.commit(Commit(number, name, ref, digest, frozen, len(lesson.rows), own.n, kept_hash, stored))
        shutil.rmtree(self.folder.work(number), ignore_errors=True)
        return Step(name, ref, digest, adapter), finished.kept

    def _lesson(self, task: TaskFile, context: Context) -> Lesson:
        name = _slug(task)
        by_name = {_slug(each): each for each in self.tasks}
        limit, seed = self.sequence.limits.train, self.sequence.seed

        def read(other: str) -> tuple[TaskFile, Rows]:
            return by_name[other], load_rows(by_name[other], "train", limit=limit, seed=seed)

        return Lesson(
            context=context,
            name=name,
            task=task,
            rows=read(name)[1],
            loaded=self.loaded,
            batch_size=self.sequence.eval_batch_size,
            seed_of=lambda phase: self.sequence.seed_of(name, phase),
            read=read,
        )

    def _trained(self, lesson: Lesson, plan: Plan) -> Learnt:
        learnt = train_in_company(
            self.loaded,
            lesson.task,
            lesson.rows,
            plan.start.spec.config,
            self._settings(lesson.name),
            name=plan.name,
            output_dir=self.folder.work(lesson.number),
            init=plan.start,
            hooks=plan.hooks,
            company=plan.company,
        )
        made = learnt.adapter.spec.lineage
        own = {"run": self.sequence.name, "step": lesson.number, "strategy": self.sequence.strategy}
        parameters = {**made.parameters, **own, TASK_SOURCE: self.sequence.tasks[lesson.number - 1]}
        lineage = replace(made, process="continual", parents=plan.parents, parameters=parameters)
        adapter = replace(learnt.adapter, spec=replace(learnt.adapter.spec, lineage=lineage))
        return replace(learnt, adapter=adapter)

    def _settings(self, task: str) -> TrainSettings:
        if "seed" in self.sequence.train:
            raise ConfigError("train.seed: the seeds of all tasks follow from the sequence's own 'seed'; set that")
        return decode(TrainSettings, {**self.sequence.train, "seed": self.sequence.seed_of(task, "train")}, "train")

    def _context(self, done: tuple[Step, ...], kept: Kept) -> Context:
        names = tuple(_slug(task) for task in self.tasks)
        return Context(self.sequence.name, names, self.untrained, done, self.sequence.scenario, kept)

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
