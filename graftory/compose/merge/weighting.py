"""One weight for each adapter, everywhere or module by module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from graftory.errors import MergeError

Weights = Sequence[float] | Mapping[str, float | Sequence[float]]
"""One for each adapter; or by patterns of modules, one for each adapter or one number for all of them."""

EVERYWHERE = "*"


@dataclass(frozen=True, slots=True)
class Weighting:
    """The weights of n adapters.

    Attributes:
        everywhere: One each, for heads and for every module that no pattern fits.
        at: One each by pattern. A pattern fits a module if it is its path or the end of it behind a dot, `*` standing
            for any characters; of several that fit the last one counts.
    """

    everywhere: tuple[float, ...]
    at: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def of(self, number: int, paths: Iterable[str]) -> dict[str, float]:
        """The weights of one adapter at modules where they are not those of everywhere, by path."""
        found = {path: self._pattern(path) for path in paths}
        return {path: self.at[pattern][number] for path, pattern in found.items() if pattern is not None}

    def check(self, paths: Sequence[str]) -> None:
        """Refuse patterns that fit no module.

        Raises:
            MergeError: If one does not.
        """
        for pattern in self.at:
            if not any(fits(pattern, path) for path in paths):
                raise MergeError(
                    f"weights: {pattern!r} fits no module of the adapters, such as {paths[0]}; * stands for anything"
                )

    def _pattern(self, path: str) -> str | None:
        return next((pattern for pattern in reversed(tuple(self.at)) if fits(pattern, path)), None)


def fits(pattern: str, path: str) -> bool:
    """Whether a pattern is a module's path or the end of it behind a dot."""
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[start:]), pattern) for start in range(len(parts)))


def weighting_of(weights: Weights | None, count: int, default: float) -> Weighting:
    """Check what a user gave.

    Args:
        weights: As in `merge`.
        count: How many adapters there are.
        default: The weight of each, where nothing else is said.

    Raises:
        MergeError: If there are not as many as adapters, or one is not finite.
    """
    by_pattern = dict(weights) if isinstance(weights, Mapping) else {} if weights is None else {EVERYWHERE: weights}
    checked = {pattern: _each(pattern, values, count) for pattern, values in by_pattern.items()}
    return Weighting(checked.pop(EVERYWHERE, (float(default),) * count), checked)


def _each(pattern: str, values: float | Sequence[float], count: int) -> tuple[float, ...]:
    where = "" if pattern == EVERYWHERE else f" at {pattern!r}"
    listed = [values] * count if isinstance(values, int | float) else list(values)
    if len(listed) != count:
        raise MergeError(f"got {len(listed)} weights for {count} adapters{where}, wanted one each")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in listed):
        raise MergeError(f"weights{where}: got {listed}, wanted finite numbers")
    return tuple(float(value) for value in listed)
