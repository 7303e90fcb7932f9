"""What has become of the first rows of each task, by adapter: only rows that are new are run."""

from __future__ import annotations

from graftory.adapter import Adapter
from graftory.compose.merge.judging import Bench, Verdict
from graftory.training.prediction import Scored


class Seen:
    """Adapters on the rows of a bench. An adapter is known by what it is in memory: hold it as long as this."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._scored: dict[tuple[int, int], list[Scored]] = {}

    def verdict(self, adapter: Adapter | None, number: int, rows: int) -> Verdict:
        """On the first so many rows of one trial."""
        return self.bench.trials[number].verdict(self._until(adapter, number, rows))

    def answers(self, adapter: Adapter | None, number: int, rows: int) -> tuple[float, ...]:
        """How good the answer to each of the first so many rows is, see `Trial.answers`."""
        return self.bench.trials[number].answers(self._until(adapter, number, rows))

    def _until(self, adapter: Adapter | None, number: int, rows: int) -> list[Scored]:
        scored = self._scored.setdefault((id(adapter), number), [])
        rows = min(rows, len(self.bench.trials[number].rows))
        if len(scored) < rows:
            scored += self.bench.scored_on(adapter, number, slice(len(scored), rows))
        return scored[:rows]
