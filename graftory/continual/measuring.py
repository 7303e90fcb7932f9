"""Fill the matrix: what is missing of a row is measured; what is there, or has not changed since the row before, is not
measured again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from graftory.continual.evaluation import ABSTAINED, TestSet, oracle_cell, oracle_cells, routed_cell, routes_of
from graftory.continual.probe import Probe
from graftory.continual.router import Router
from graftory.continual.router_fit import router_features
from graftory.continual.state import Cell, RunFolder
from graftory.continual.strategies import Answer, Context, Strategy
from graftory.continual.unchanged import mark, routed_mark, unchanged
from graftory.training import LoadedBase


@dataclass
class Measuring:
    """Measures the tests of a sequence, in order, and keeps the cells in the run's folder."""

    loaded: LoadedBase
    tests: Sequence[TestSet]
    strategy: Strategy
    folder: RunFolder
    batch_size: int
    mixed: bool = False
    """Whether the tasks learnt so far are measured together."""
    probe: Probe | None = None
    features: dict[int, Tensor] = field(default_factory=dict)
    """Features of the test rows, by position; the base is frozen, so they are taken once."""
    right: dict[int, tuple[str, Sequence[bool]]] = field(default_factory=dict)
    """The mark of what last answered a test with the id given, and whether each row was right, by position."""

    def row(self, number: int, context: Context, router: Router | None, *, seen: int = 0) -> Cell:
        """Measure row `number` of the matrix, in both ways.

        Args:
            number: Of the step, from 1.
            context: After that step.
            router: None if the strategy has nothing to route.
            seen: So many tasks go through the router; 0: those up to the step's own.

        Returns:
            The cell of the task just learnt.
        """
        answers, marks = self.fill(number, context)
        if router is not None:
            self._route(number, dict(zip(context.tasks, answers, strict=True)), marks, router, seen or number)
        self._probe(number, context, answers, router)
        own = self.folder.cell(number, number - 1, "oracle")
        assert own is not None
        return own

    def fill(self, number: int, context: Context) -> tuple[tuple[Answer, ...], tuple[str, ...]]:
        """Measure what is missing of a row with the id given; returns what answers each task, and its mark."""
        answers = tuple(self.strategy.answer(context, name) for name in context.tasks)
        marks = tuple(map(mark, answers))
        if self.mixed:
            self._together(number, [j for j, name in enumerate(context.tasks) if context.step_of(name)], answers)
        for j, answer in enumerate(answers):
            if self.folder.cell(number, j, "oracle") is None:
                self.alone(number, j, answer, marks[j])
        return answers, marks

    def alone(self, number: int, position: int, answer: Answer, own: str) -> None:
        """Measure a task with its id given, or take it as it was at the step before if it has the same mark."""
        cell = unchanged(self.folder.cell(number - 1, position, "oracle"), own, number)
        self.folder.put_cell(cell or self._asked(number, position, answer, own))

    def baseline(self) -> None:
        """Let the bare base read the general text."""
        if self.probe is not None and self.folder.probed(0) is None:
            self.folder.put_probed(self.probe.base())

    def _together(self, number: int, learnt: Sequence[int], answers: Sequence[Answer]) -> None:
        """Measure the tasks learnt so far in one go. If one is missing all are measured: what else is in a batch has a
        say in the last bits, and a run that was killed is to find what it would have found.
        """
        if all(self.folder.cell(number, j, "oracle") is not None for j in learnt):
            return
        tests = {j: (self.tests[j], answers[j]) for j in learnt}
        for told in oracle_cells(self.loaded, number, tests, self.batch_size):
            self.folder.put_cell(told.cell)

    def _probe(self, number: int, context: Context, answers: Sequence[Answer], router: Router | None) -> None:
        if self.probe is None or self.folder.probed(number) is not None:
            return
        named = zip(context.tasks, answers, strict=True)
        bodies = {name: answer.body for name, answer in named if context.step_of(name)}
        points = (self.folder.probed(step) for step in range(number - 1, -1, -1))
        before = next((point for point in points if point is not None), None)
        self.folder.put_probed(self.probe.after(number, bodies, router, before))

    def _route(
        self, number: int, answers: Mapping[str, Answer], marks: Sequence[str], router: Router, seen: int
    ) -> None:
        """Measure what is missing of a row by the router, which is asked once for the rows of all tests."""
        missing = [j for j in range(seen) if self.folder.cell(number, j, "routed") is None]
        if not missing:
            return
        choices = router.route(torch.cat([self._features(j, router) for j in range(seen)]))
        parts = choices.split([len(self.tests[j].rows) for j in range(seen)])
        known = {**dict(zip(answers, marks, strict=True)), ABSTAINED: mark(Answer(None, None))}
        for j in missing:
            # a mixture weighs by scores, which each new task changes
            own = "" if router.settings.answer == "mixture" else routed_mark(routes_of(router, parts[j]), known)
            cell = unchanged(self.folder.cell(number - 1, j, "routed"), own, number)
            if cell is None:
                right = self._right(number, j, list(answers.values())[j], marks[j])
                size = self.batch_size
                made = routed_cell(self.loaded, number, j, self.tests, answers, router, parts[j], size, right)
                cell = replace(made, mark=own)
            self.folder.put_cell(cell)

    def _right(self, number: int, position: int, answer: Answer, own: str) -> Sequence[bool]:
        """Whether each row of a test is right when its own task answers; nothing where tasks are measured together."""
        if self.mixed or not own:
            return ()
        if self.right.get(position, ("", ()))[0] != own:  # the cell is of an earlier start
            self._asked(number, position, answer, own)
        return self.right[position][1]

    def _asked(self, number: int, position: int, answer: Answer, own: str) -> Cell:
        told = oracle_cell(self.loaded, number, position, self.tests[position], answer, self.batch_size)
        self.right[position] = own, told.right
        return replace(told.cell, mark=own)

    def _features(self, position: int, router: Router) -> Tensor:
        if position not in self.features:
            texts = self.tests[position].rows.texts
            self.features[position] = router_features(self.loaded, router, texts, self.batch_size)
        return self.features[position]
