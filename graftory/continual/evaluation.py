"""The cells of the matrix: each task by its id, and by the router.

With the id given, a task is always evaluated in batches of its own rows alone. What else is in the run
then has no say in padding or rounding, so an adapter that has not changed gives the same bits again:
BWT = 0 exactly is a matter of construction, not of luck. (Mixing tasks in a batch changes the padding of
its rows, which can turn a row that stands on the edge.) Routed rows do go in mixed batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from graftory.continual.router import ABSTAIN, Router
from graftory.continual.state import Cell
from graftory.continual.strategies import Answer
from graftory.data import Rows, TaskFile
from graftory.training import Job, LoadedBase, evaluate

ABSTAINED = "abstained"
ROW_MEANS = ("accuracy", "exact_match")
"""Metrics that are means over rows with 0 for a wrong row; only these can be put together from parts."""


@dataclass(frozen=True, slots=True)
class TestSet:
    """A task and the rows it is measured on."""

    __test__ = False  # not for pytest

    task: TaskFile
    rows: Rows


def oracle_cell(loaded: LoadedBase, step: int, position: int, test: TestSet, answer: Answer, batch_size: int) -> Cell:
    """Measure one task, its id given."""
    [metrics] = evaluate(loaded, [_job("oracle", test.task, test.rows, answer)], batch_size=batch_size)
    metric = metrics[0]
    return Cell(step, position, "oracle", metric.name, metric.value, len(test.rows))


def routed_cell(
    loaded: LoadedBase,
    step: int,
    position: int,
    tests: Sequence[TestSet],
    answers: Mapping[str, Answer],
    router: Router,
    features: Tensor,
    batch_size: int,
) -> Cell:
    """Measure one task with the router's choice for each row, in mixed batches.

    A row sent to another task counts as wrong, unless that task has the same kind and labels: then the
    other adapter's answer counts. A row on which the router abstains goes to the bare base, which is wrong
    where the task needs a head.

    Args:
        loaded: The base and its tokenizer.
        step: Number of the step, from 1.
        position: Which of the tests is measured.
        tests: All tests, in the order of the sequence.
        answers: The answer of every task that the router knows.
        router: The router.
        features: Features of the test's rows; the base is frozen, so they are taken once a run.
        batch_size: Rows at a time.
    """
    test = tests[position]
    chosen = [ABSTAINED if i == ABSTAIN else router.names[i] for i in router.route(features).task.tolist()]
    routes = dict(sorted(Counter(chosen).items()))
    if test.task.metric not in ROW_MEANS:
        return Cell(step, position, "routed", test.task.metric, None, len(test.rows), routes)
    others = {other.task.name: other for other in tests}
    jobs = []
    for route in routes:
        answer = Answer(None, None) if route == ABSTAINED else answers[route]
        can = not _has_head(test) if route == ABSTAINED else _same_question(test, others[route])
        if can:
            jobs.append(_job(route, test.task, _subset(test.rows, [name == route for name in chosen]), answer))
    results = evaluate(loaded, jobs, batch_size=batch_size) if jobs else ()
    right = sum(metrics[0].value * len(job.rows) for job, metrics in zip(jobs, results, strict=True))
    return Cell(step, position, "routed", test.task.metric, right / len(test.rows), len(test.rows), routes)


def _job(name: str, task: TaskFile, rows: Rows, answer: Answer) -> Job:
    return Job(name=name, adapter=answer.body, head=answer.head, task=task, rows=rows)


def _has_head(test: TestSet) -> bool:
    return test.rows.info(test.task).outputs > 0


def _same_question(test: TestSet, other: TestSet) -> bool:
    return (test.task.kind, test.rows.labels) == (other.task.kind, other.rows.labels)


def _subset(rows: Rows, keep: Sequence[bool]) -> Rows:
    kept = [i for i, wanted in enumerate(keep) if wanted]
    texts, targets = tuple(rows.texts[i] for i in kept), tuple(rows.targets[i] for i in kept)
    return Rows(rows.split, texts, targets, rows.labels)
