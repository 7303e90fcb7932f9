"""The cells of the matrix: each task by its id, and by the router.

With the id given, a task is always evaluated in batches of its own rows alone. What else is in the run
then has no say in padding or rounding, so an adapter that has not changed gives the same bits again:
BWT = 0 exactly is a matter of construction, not of luck, and such a cell is not measured again (see
`unchanged`). Mixing tasks in a batch changes the padding of its rows, which can turn a row that stands on the
edge. All tasks learnt so far do go in mixed batches where `eval_mixed` says so, as it does for language models unless
it is turned off; and so do the rows that the router sends to another task than their own. Those that it sends to their
own are answered as with the id given, and are not run again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftory.continual.router import ABSTAIN, Choice, Router
from graftory.continual.state import Cell
from graftory.continual.strategies import Answer
from graftory.data import TEXT_KINDS, Rows, TaskFile
from graftory.training import LoadedBase
from graftory.training.evaluation import Job, Measured, evaluate_rows
from graftory.training.metrics import ROW_MEANS, measure
from graftory.training.prediction import score

ABSTAINED = "abstained"


@dataclass(frozen=True, slots=True)
class TestSet:
    """A task and the rows it is measured on."""

    __test__ = False  # not for pytest

    task: TaskFile
    rows: Rows


@dataclass(frozen=True, slots=True)
class Told:
    """What a test tells of an answer."""

    cell: Cell
    right: tuple[bool, ...] = ()
    """Whether each row is right; empty if that is not known."""


def oracle_cell(loaded: LoadedBase, step: int, position: int, test: TestSet, answer: Answer, batch_size: int) -> Told:
    """Measure one task, its id given."""
    return oracle_cells(loaded, step, {position: (test, answer)}, batch_size)[0]


def oracle_cells(
    loaded: LoadedBase, step: int, tests: Mapping[int, tuple[TestSet, Answer]], batch_size: int
) -> list[Told]:
    """Measure tasks together, their ids given: every row of a batch with its own task's adapter.

    Args:
        loaded: The base and its tokenizer.
        step: Number of the step; 0 is before the first.
        tests: What is measured and what answers it, by position in the sequence.
        batch_size: Rows at a time.
    """
    headed = {position: pair for position, pair in tests.items() if pair[1].readout is None}
    jobs = [_job(f"oracle {position}", test.task, test.rows, answer) for position, (test, answer) in headed.items()]
    results = evaluate_rows(loaded, jobs, batch_size=batch_size) if jobs else ()
    told = [_told(step, position, job, found) for position, job, found in zip(headed, jobs, results, strict=True)]
    read = ((position, *pair) for position, pair in tests.items() if position not in headed)
    return [*told, *(Told(_read_cell(loaded, step, *each, batch_size)) for each in read)]


def _told(step: int, position: int, job: Job, found: Measured) -> Told:
    own, loss = found.metrics[0], found.metrics[-1].value if job.task.kind in TEXT_KINDS else None
    return Told(Cell(step, position, "oracle", own.name, own.value, own.n, loss=loss), found.right(job.rows.targets))


def _read_cell(loaded: LoadedBase, step: int, position: int, test: TestSet, answer: Answer, batch_size: int) -> Cell:
    assert answer.readout is not None
    outputs = answer.readout.outputs(loaded, answer.body, test.rows.texts, batch_size)
    metric = test.task.metric
    return Cell(step, position, "oracle", metric, measure(metric, test.rows.targets, outputs), len(test.rows))


def routes_of(router: Router, choice: Choice) -> list[str]:
    """Where each row goes: a task, or `abstained`."""
    return [ABSTAINED if i == ABSTAIN else router.names[i] for i in choice.task.tolist()]


def routed_cell(
    loaded: LoadedBase,
    step: int,
    position: int,
    tests: Sequence[TestSet],
    answers: Mapping[str, Answer],
    router: Router,
    choice: Choice,
    batch_size: int,
    own: Sequence[bool] = (),
) -> Cell:
    """Measure one task with the router's choice for each row, in mixed batches.

    A row sent to another task counts as wrong, unless that task has the same kind and labels: then the
    other adapter's answer counts; or, where the router's settings say `mixture`, that of all such tasks, each by its
    posterior. A row on which the router abstains goes to the bare base, which is wrong where the task needs a head.

    Args:
        loaded: The base and its tokenizer.
        step: Number of the step, from 1.
        position: Which of the tests is measured.
        tests: All tests, in the order of the sequence.
        answers: The answer of every task, in the order of the tests.
        router: The router.
        choice: What it says of the test's rows.
        batch_size: Rows at a time.
        own: Whether each row is right when its own task's answer is asked, so that this need not be done again; empty
            if that is not known.
    """
    test, chosen = tests[position], routes_of(router, choice)
    routes = dict(sorted(Counter(chosen).items()))
    if test.task.metric not in ROW_MEANS:
        return Cell(step, position, "routed", test.task.metric, None, len(test.rows), routes)
    others = dict(zip(answers, tests, strict=True))
    alike = [i for i, name in enumerate(router.names) if _same_question(test, others[name])]
    if router.settings.answer == "mixture" and len(alike) > 1 and test.rows.labels:
        among = {router.names[i]: answers[router.names[i]] for i in alike}
        rows = [i for i, name in enumerate(chosen) if name in among]
        weights = choice.scores[rows][:, alike].softmax(1)
        right = mixture_right(loaded, test, rows, tuple(among.values()), weights, batch_size)
        return Cell(step, position, "routed", test.task.metric, right / len(test.rows), len(test.rows), routes)
    known = (list(answers)[position],) if own else ()
    right = sum(own[row] for row, name in enumerate(chosen) if name in known)
    jobs = []
    for route in routes:
        answer = Answer(None, None) if route == ABSTAINED else answers[route]
        can = not _has_head(test) if route == ABSTAINED else _same_question(test, others[route])
        if can and route not in known:
            jobs.append(_job(route, test.task, _subset(test.rows, [name == route for name in chosen]), answer))
    results = evaluate_rows(loaded, jobs, batch_size=batch_size) if jobs else ()
    right += sum(sum(found.right(job.rows.targets)) for job, found in zip(jobs, results, strict=True))
    return Cell(step, position, "routed", test.task.metric, right / len(test.rows), len(test.rows), routes)


def mixture_right(
    loaded: LoadedBase, test: TestSet, rows: Sequence[int], answers: Sequence[Answer], weights: Tensor, batch_size: int
) -> int:
    """How many rows argmax_y Σ_t p(t | x) p_t(y | x) tells right, each t one of several answers to the same question.

    Args:
        loaded: The base and its tokenizer.
        test: The task and its rows.
        rows: Which of them.
        answers: What can answer.
        weights: p(t | x), [rows, answers].
        batch_size: Rows at a time.
    """
    if not rows:
        return 0
    some = _subset(test.rows, [i in set(rows) for i in range(len(test.rows))])
    queries = [query for answer in answers for query in _job("", test.task, some, answer).queries()]
    logits = [row.logits for row in score(loaded, queries, batch_size=batch_size)]
    probabilities = torch.stack([each.double().softmax(0) for each in logits if each is not None])
    mixed = (probabilities.unflatten(0, (len(answers), len(rows))) * weights.T[:, :, None]).sum(0)
    return int((mixed.argmax(1) == torch.tensor(some.targets)).sum())


def _job(name: str, task: TaskFile, rows: Rows, answer: Answer) -> Job:
    return Job(name=name, adapter=answer.body, head=answer.head, task=task, rows=rows, mixture=answer.mixture)


def _has_head(test: TestSet) -> bool:
    return test.rows.info(test.task).outputs > 0


def _same_question(test: TestSet, other: TestSet) -> bool:
    return (test.task.kind, test.rows.labels) == (other.task.kind, other.rows.labels)


def _subset(rows: Rows, keep: Sequence[bool]) -> Rows:
    kept = [i for i, wanted in enumerate(keep) if wanted]
    texts, targets = tuple(rows.texts[i] for i in kept), tuple(rows.targets[i] for i in kept)
    return Rows(rows.split, texts, targets, rows.labels)
