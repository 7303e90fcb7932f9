"""What was chosen beside each adapter alone, by how many answers are right, on as many rows as that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graftory.compose.merge.tuning.race import Entrant
from graftory.compose.merge.tuning.seen import Seen
from graftory.compose.merge.tuning.shares import ahead, shares_of
from graftory.progress import Progress

MORE = 8
"""So many times the rows of the race are looked at, if it stays open which of two is the better."""
FEWEST = 64
"""Of fewer rows their spread is not known: where two are right on the same few, nothing is settled."""
MARGIN = 0.01
"""So much of what the tasks' own adapters get right, what is kept may lose against an adapter alone."""
SURE = 2.0
"""So many standard errors settle it."""


@dataclass(frozen=True, slots=True)
class Beside:
    """An adapter alone, beside what was chosen.

    Attributes:
        name: What the table calls it.
        ahead: By how much more of what the tasks' own adapters get right it gets right, the mean over tasks, and the
            standard error of that over the rows.
        rows: So many of each task they were held against each other on, where a task has as many.
    """

    name: str
    ahead: tuple[float, float]
    rows: int

    @property
    def harmless(self) -> bool:
        """Whether it is surely no more than the margin ahead."""
        return self.ahead[0] + SURE * self.ahead[1] < MARGIN

    @property
    def better(self) -> bool:
        """Whether it gets more right, and that may be more than the margin."""
        return self.ahead[0] > 0 and not self.harmless

    @property
    def settled(self) -> bool:
        """Whether more rows would hardly change it."""
        return self.harmless or self.ahead[0] - SURE * self.ahead[1] > 0


def beside_alone(
    seen: Seen, chosen: Entrant, singles: Sequence[Entrant], rows: int, progress: Progress
) -> tuple[Beside, ...]:
    """Hold what was chosen against adapters alone, on twice as many rows where it is open, until all are used up.

    The race goes by likelihoods, which tell more of few rows, but are not what a user counts: one of the two may be
    right more often, and the other less far off where it is wrong.

    Args:
        seen: What is known of the rows.
        chosen: What was chosen.
        singles: The adapters alone.
        rows: Of each task, so many at first, or 64.
        progress: Called with what goes on.

    Returns:
        All of them, those that get most right first; none if no task has labels, as the race has told the same then.
    """
    if not any(trial.has_labels for trial in seen.bench.trials):
        return ()
    most = max(len(trial.rows) for trial in seen.bench.trials)
    found: dict[str, Beside] = {}
    left, look = list(singles), max(rows, FEWEST)
    while left:
        for done, one in enumerate(left):
            progress(f"beside each alone, on {look} rows of each task", done, len(left))
            found[one.name] = _beside(seen, chosen, one, look)
        left = [one for one in left if not found[one.name].settled]
        if look >= most:
            break
        look *= 2
    return tuple(sorted(found.values(), key=lambda each: -each.ahead[0]))


def _beside(seen: Seen, chosen: Entrant, single: Entrant, rows: int) -> Beside:
    trials = list(enumerate(seen.bench.trials))
    own = [seen.answers(trial.adapter, number, rows) for number, trial in trials]
    after, alone = (
        shares_of([seen.answers(adapter, number, rows) for number, _ in trials], own)
        for adapter in (chosen.adapter, single.adapter)
    )
    return Beside(single.name, ahead(alone, after), max(map(len, own)))
