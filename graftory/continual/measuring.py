"""Fill the matrix: what is missing of a row is measured, what is there is not measured again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from graftory.continual.evaluation import TestSet, oracle_cell, routed_cell
from graftory.continual.router import Router
from graftory.continual.state import Cell, RunFolder
from graftory.continual.strategies import Answer, Context, Strategy
from graftory.training import LoadedBase
from graftory.training.features import features_of


@dataclass
class Measuring:
    """Measures the tests of a sequence, in order, and keeps the cells in the run's folder."""

    loaded: LoadedBase
    tests: Sequence[TestSet]
    strategy: Strategy
    folder: RunFolder
    batch_size: int
    features: dict[int, Tensor] = field(default_factory=dict)
    """Features of the test rows, by position; the base is frozen, so they are taken once."""

    def row(self, number: int, context: Context, router: Router | None) -> Cell:
        """Measure row `number` of the matrix, in both ways.

        Args:
            number: Of the step, from 1.
            context: After that step.
            router: None if the strategy has nothing to route.

        Returns:
            The cell of the task just learnt.
        """
        answers = self.fill(number, context)
        for j in range(number):
            if router is not None and self.folder.cell(number, j, "routed") is None:
                answered = dict(zip(context.tasks, answers, strict=True))
                features = self._features(j)
                cell = routed_cell(self.loaded, number, j, self.tests, answered, router, features, self.batch_size)
                self.folder.put_cell(cell)
        own = self.folder.cell(number, number - 1, "oracle")
        assert own is not None
        return own

    def fill(self, number: int, context: Context) -> tuple[Answer, ...]:
        """Measure what is missing of a row with the id given; returns what answers each task."""
        answers = tuple(self.strategy.answer(context, name) for name in context.tasks)
        for j, answer in enumerate(answers):
            if self.folder.cell(number, j, "oracle") is None:
                learnt = context.step_of(context.tasks[j]) is not None
                self.folder.put_cell(self._oracle(number, j, answer, learnt))
        return answers

    def _oracle(self, number: int, position: int, answer: Answer, learnt: bool) -> Cell:
        """A task measured with its id given; a task that no adapter answers yet keeps its untrained value."""
        before = self.folder.cell(0, position, "oracle")
        if answer.body is None and not learnt and before is not None:
            return replace(before, step=number, copied=True)
        return oracle_cell(self.loaded, number, position, self.tests[position], answer, self.batch_size)

    def _features(self, position: int) -> Tensor:
        if position not in self.features:
            texts = self.tests[position].rows.texts
            self.features[position] = features_of(self.loaded, texts, batch_size=self.batch_size)
        return self.features[position]
