"""Run a sequence of tasks: PREPARE, TRAIN, CONSOLIDATE, EVAL, COMMIT for each, resumable between tasks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from graftory.adapter import TASK_SOURCE, Adapter, Lineage, Metric, check_name
from graftory.continual.capability import check_capability, check_kinds, check_labels
from graftory.continual.evaluation import TestSet
from graftory.continual.freeze import must_stay
from graftory.continual.gate import ALIAS, Verdict, judge, scores_of, ways_of
from graftory.continual.ledger import stored_bytes
from graftory.continual.measuring import Measuring
from graftory.continual.probe import Probe, probe_texts
from graftory.continual.report import Report, make_report
from graftory.continual.report_files import write_report
from graftory.continual.restoring import restored, untrained_adapters
from graftory.continual.router import check_names
from graftory.continual.router_file import load_router
from graftory.continual.router_fit import fit_router, fresh_router
from graftory.continual.sequence import TaskSequence
from graftory.continual.state import Cell, Commit, Event, Phase, RunFolder
from graftory.continual.strategies import NOTHING, Context, Finished, Kept, Lesson, Plan, Step, Strategy, strategy_of
from graftory.continual.unchanged import mark
from graftory.data import TEXT_KINDS, Rows, TaskFile, load_rows, load_task
from graftory.errors import ConfigError
from graftory.hub import Hub
from graftory.schema import Json, decode
from graftory.training import LoadedBase, TrainSettings, load_base, processes
from graftory.training.company import Learnt
from graftory.training.learning import train_in_company
from graftory.training.reporting import Reporting, check_reporting
from graftory.versions import library_versions

Progress = Callable[[Event], None]
_SCORES = ("accuracy", "f1", "matthews", "pearson", "spearman", "exact_match", "likelihood")
"""Metrics where more is better and 1 is best, so that the matrix can be read and averaged."""
_FAMILIES = {"classification": "classification", "regression": "classification"}
"""Kinds that share a model class; the others stand alone."""


def run_sequence(sequence: TaskSequence, hub: Hub, folder: str | Path, *, progress: Progress | None = None) -> Report:
    """Learn the tasks one after another; or go on where an earlier run in the folder was stopped.

    Every step becomes a version in the hub. A step that was not committed is done again from its start (or from the
    trainer's own checkpoint) and gives the same adapter, as all seeds follow from (seed, task, phase). With a gate
    (`max_drop`) a version that it rejects is kept too; the next task starts from the last accepted one, which the alias
    `accepted` means.

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
    with _only_one(root) if processes.is_first() else nullcontext():
        return _Run(sequence, hub, RunFolder(root), progress).all()


@dataclass(frozen=True, slots=True)
class _State:
    """What is in force: the steps accepted so far, what the strategy kept at the last of them, and its number."""

    done: tuple[Step, ...] = ()
    kept: Kept = NOTHING
    number: int = 0


@dataclass(frozen=True, slots=True)
class _Measured:
    """What is known of a step before it is committed."""

    own: Cell
    """Of its own task."""
    verdict: Verdict
    kept_hash: str
    in_force: Context
    """What answers from now on."""


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
        tasks = tuple(_scored(load_task(source)) for source in self.sequence.tasks)
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
        check_kinds(self.sequence, self.strategy.needs, tasks)
        return tasks

    @cached_property
    def tests(self) -> tuple[TestSet, ...]:
        limit, seed = self.sequence.limits.test, self.sequence.seed
        return tuple(TestSet(task, load_rows(task, "test", limit=limit, seed=seed)) for task in self.tasks)

    @cached_property
    def general(self) -> tuple[str, ...]:
        """The probe's texts."""
        return () if self.sequence.probe is None else probe_texts(self.sequence.probe, self.sequence.seed)

    @cached_property
    def loaded(self) -> LoadedBase:
        return load_base(self.sequence.base, self.tasks[0].kind)

    @cached_property
    def untrained(self) -> dict[str, Adapter]:
        infos = {_slug(test.task): test.rows.info(test.task) for test in self.tests}
        return untrained_adapters(self.sequence, self.loaded, infos)

    @cached_property
    def measuring(self) -> Measuring:
        sequence, probe = self.sequence, None
        mixed = self.tasks[0].kind in TEXT_KINDS if sequence.eval_mixed is None else sequence.eval_mixed
        if sequence.probe is not None:
            probe = Probe(self.loaded, self.general, sequence.probe.max_length, sequence.eval_batch_size)
        return Measuring(self.loaded, self.tests, self.strategy, self.folder, sequence.eval_batch_size, mixed, probe)

    def all(self) -> Report:
        check_reporting(self.sequence.report_to)
        _ = self.strategy, self.tasks, self._settings("")  # all that can be wrong is wrong before training
        commits = self.folder.commits()
        if len(commits) < len(self.tasks):
            check_labels(self.sequence.scenario, [test.rows.info(test.task) for test in self.tests])
            _ = self.general
            if self.strategy.routable:
                fresh_router(self.sequence, self.loaded)
        if processes.is_first():
            self.folder.open(self.sequence)
        processes.wait()
        if len(commits) < len(self.tasks):
            self._learn(commits)
        tasks = [_slug(task) for task in self.tasks]
        report = make_report(self.sequence, self.strategy, tasks, self.folder)
        if processes.is_first():
            write_report(report, self.folder.root)
        return report

    def _learn(self, commits: list[Commit]) -> None:
        steps = {commit.step: restored(self.hub, commit) for commit in commits if commit.accepted}
        if processes.is_first():
            self._baselines()
        state = _State()
        for commit in commits:
            if commit.accepted:
                state = _State((*state.done, steps[commit.step]), self.folder.kept(commit), commit.step)
                if processes.is_first():
                    self.measuring.fill(commit.step, self._context(state.done, state.kept))  # tasks appended since then
        for position in range(len(commits), len(self.tasks)):
            state = self._step(position, state)

    def _baselines(self) -> None:
        """b_j: the bare base with an untrained head, measured once."""
        context = self._context((), NOTHING)
        missing = [j for j in range(len(self.tests)) if self.folder.cell(0, j, "oracle") is None]
        for j in missing:
            self._begin(0, _slug(self.tests[j].task), "eval")
            answer = self.strategy.answer(context, _slug(self.tests[j].task))
            self.measuring.alone(0, j, answer, mark(answer))
        self.measuring.baseline()

    def _step(self, position: int, state: _State) -> _State:
        """Learn a task; returns what is in force then: the step, or what was before where the gate rejects it."""
        number, task = position + 1, self.tasks[position]
        name = _slug(task)
        old = {step.ref: step.adapter.tensors for step in state.done}
        before = self._context(state.done, state.kept)
        with must_stay(self.loaded.model, old) as frozen:
            self._begin(number, name, "prepare")
            lesson = self._lesson(task, before)
            plan = self.strategy.prepare(lesson)
            self._begin(number, name, "train")
            learnt = self._trained(number, lesson, plan)
            self._begin(number, name, "consolidate")
            finished = self.strategy.finish(lesson, learnt)
            measured = self._measured(number, lesson, plan, finished, state) if processes.is_first() else None
        if measured is None:
            return self._after_the_first(state)
        in_force = self._committed(number, lesson, plan, finished, measured, frozen, state)
        processes.wait()
        return in_force

    def _measured(self, number: int, lesson: Lesson, plan: Plan, finished: Finished, state: _State) -> _Measured:
        """What a step keeps besides its adapter, its row of the matrix, and what the gate says of it."""
        kept_hash = self.folder.put_kept(number, finished.kept)
        path, name = self.folder.begin_router(), lesson.name
        routed = self.strategy.routable
        router = fit_router(self.sequence, self.loaded, path, name, lesson.rows) if routed else None
        self._begin(number, name, "eval")
        seen = (*state.done, Step(name, f"{plan.name} (in progress)", "", finished.adapter))
        after = self._context(seen, finished.kept)
        own = self.measuring.row(number, after, router)
        verdict = self._verdict(number, state)
        if not verdict.accepted:
            present = load_router(self.folder.router) if routed else None
            self.measuring.row(state.number, lesson.context, present, seen=number)
            self._begin(number, name, "rejected", self._gate_facts(verdict))
        return _Measured(own, verdict, kept_hash, after if verdict.accepted else lesson.context)

    def _committed(
        self, number: int, lesson: Lesson, plan: Plan, finished: Finished, measured: _Measured, frozen: str,
        state: _State,
    ) -> _State:  # fmt: skip
        """Put the step into the hub and, last of all, its commit into the folder."""
        own, verdict, name = measured.own, measured.verdict, lesson.name
        self._begin(number, name, "commit")
        metric = Metric(own.metric, own.value if own.value is not None else 0.0, name, "test", own.n)
        adapter = replace(finished.adapter, spec=replace(finished.adapter.spec, metrics=(metric,)))
        if self.sequence.max_drop is not None:
            adapter = _with_parameters(adapter, {"gate": self._gate_facts(verdict)})
        version = self.hub.put(plan.name, adapter)
        ref, digest = str(version), self.hub.record(version).digest
        self.folder.end_router(accepted=verdict.accepted)
        if self.sequence.max_drop is not None and verdict.accepted:
            self.hub.set_alias(version.name, ALIAS, version.version or 0)
        stored = stored_bytes(self.strategy, measured.in_force, self.folder.router if self.strategy.routable else None)
        self.folder.commit(
            Commit(
                number, name, ref, digest, frozen, len(lesson.rows), own.n, measured.kept_hash, stored,
                verdict.accepted, verdict.drop, verdict.task,
            )
        )  # fmt: skip
        shutil.rmtree(self.folder.work(number), ignore_errors=True)
        if not verdict.accepted:
            return state
        return _State((*state.done, Step(name, ref, digest, adapter)), finished.kept, number)

    def _after_the_first(self, state: _State) -> _State:
        """What is in force when the first process has measured and committed a step that all have learnt."""
        processes.wait()
        commit = self.folder.commits()[-1]
        if not commit.accepted:
            return state
        return _State((*state.done, restored(self.hub, commit)), self.folder.kept(commit), commit.step)

    def _verdict(self, number: int, state: _State) -> Verdict:
        """What the gate says of a step that has been measured."""
        if self.sequence.max_drop is None:
            return Verdict(True, 0.0, "")
        positions = {_slug(task): j for j, task in enumerate(self.tasks)}
        old = {step.task: positions[step.task] for step in state.done}
        ways = ways_of(self.sequence.scenario, routable=self.strategy.routable)
        before, after = (scores_of(self.folder, step, old, ways) for step in (state.number, number))
        return judge(before, after, self.sequence.max_drop)

    def _gate_facts(self, verdict: Verdict) -> Mapping[str, Json]:
        return {
            "accepted": verdict.accepted,
            "drop": verdict.drop,
            "max_drop": self.sequence.max_drop,
            "task": verdict.task,
        }

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

    def _trained(self, number: int, lesson: Lesson, plan: Plan) -> Learnt:
        learnt = self._taught(number, lesson, plan) if plan.trains else Learnt(_as_begun(lesson, plan))
        own = {"run": self.sequence.name, "step": number, "strategy": self.sequence.strategy}
        adapter = _with_parameters(learnt.adapter, {**own, TASK_SOURCE: self.sequence.tasks[number - 1]})
        lineage = replace(adapter.spec.lineage, process="continual", parents=plan.parents)
        return replace(learnt, adapter=replace(adapter, spec=replace(adapter.spec, lineage=lineage)))

    def _taught(self, number: int, lesson: Lesson, plan: Plan) -> Learnt:
        return train_in_company(
            self.loaded,
            lesson.task,
            lesson.rows,
            plan.start.spec.config,
            self._settings(lesson.name),
            name=plan.name,
            output_dir=self.folder.work(number),
            init=plan.start,
            hooks=plan.hooks,
            company=plan.company,
            reporting=self._reporting(number, lesson.name),
            fresh_head=_same_head(plan.start, lesson.context.untrained[lesson.name]),
        )

    def _reporting(self, number: int, task: str) -> Reporting:
        run = f"{self.sequence.name} {self.sequence.strategy} {number} {task}"
        return Reporting(self.sequence.report_to, run, self.folder.logs(number, task))

    def _settings(self, task: str) -> TrainSettings:
        if "seed" in self.sequence.train:
            raise ConfigError("train.seed: the seeds of all tasks follow from the sequence's own 'seed'; set that")
        return decode(TrainSettings, {**self.sequence.train, "seed": self.sequence.seed_of(task, "train")}, "train")

    def _context(self, done: tuple[Step, ...], kept: Kept) -> Context:
        names = tuple(_slug(task) for task in self.tasks)
        return Context(self.sequence.name, names, self.untrained, done, self.sequence.scenario, kept)

    def _begin(self, step: int, task: str, phase: Phase, detail: Mapping[str, Json] | None = None) -> None:
        if not processes.is_first():
            return
        event = self.folder.log(Event(step, task, phase, detail=detail or {}))
        if self.progress is not None:
            self.progress(event)


def _slug(task: TaskFile) -> str:
    """A task's name as part of an adapter's name."""
    return task.name.replace("/", "-")


def _same_head(adapter: Adapter, untrained: Adapter) -> bool:
    own, other = adapter.head_tensors(), untrained.head_tensors()
    return own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)


def _as_begun(lesson: Lesson, plan: Plan) -> Adapter:
    """What a task that trains nothing has for its adapter."""
    spec = plan.start.spec
    lineage = Lineage(parameters={"rows": len(lesson.rows)}, data_hash=lesson.rows.hash, libraries=library_versions())
    return replace(plan.start, spec=replace(spec, lineage=lineage, metrics=()))


def _scored(task: TaskFile) -> TaskFile:
    """A task of text that is measured by its loss L counts by exp(-L): of scores, more is better, and 1 is best."""
    return replace(task, metric="likelihood") if task.metric == "loss" and task.kind in TEXT_KINDS else task


def _with_parameters(adapter: Adapter, more: Mapping[str, Json]) -> Adapter:
    """The adapter with more in its lineage's parameters."""
    lineage = adapter.spec.lineage
    lineage = replace(lineage, parameters={**lineage.parameters, **more})
    return replace(adapter, spec=replace(adapter.spec, lineage=lineage))


@contextmanager
def _only_one(root: Path) -> Iterator[None]:
    try:
        with FileLock(root / ".lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(f"another run is at work in {root}; wait for it, or give another folder") from None
