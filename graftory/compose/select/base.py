"""What selecting adapters is about: domains of examples, choices with their reasons."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Domain:
    """Examples of the data that an adapter was trained on.

    Attributes:
        name: The adapter.
        features: [examples, width], a row for each.
    """

    name: str
    features: Tensor


@dataclass(frozen=True, slots=True)
class Choice:
    """What was found for one adapter.

    Attributes:
        name: The adapter.
        score: What it was judged by; the text of the selector says what it is.
        chosen: Whether it was taken.
        reason: Why, for people.
    """

    name: str
    score: float
    chosen: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Selection:
    """All that was judged, best first.

    Attributes:
        method: How.
        choices: One for each adapter.
    """

    method: str
    choices: tuple[Choice, ...]

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names that were taken, best first."""
        return tuple(choice.name for choice in self.choices if choice.chosen)
