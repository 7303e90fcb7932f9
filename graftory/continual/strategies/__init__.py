"""Every strategy, one file each."""

from __future__ import annotations

from collections.abc import Mapping

from graftory.continual.strategies.base import Answer, Context, Plan, Step, Strategy
from graftory.continual.strategies.isolated import Isolated
from graftory.continual.strategies.seq import Sequential
from graftory.errors import ConfigError

STRATEGIES: Mapping[str, Strategy] = {row.name: row for row in (Sequential(), Isolated())}
"""Every strategy, by name."""

__all__ = ["STRATEGIES", "Answer", "Context", "Plan", "Step", "Strategy", "strategy_of"]


def strategy_of(name: str) -> Strategy:
    """The strategy of a name.

    Raises:
        ConfigError: If there is none.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"strategy: unknown strategy {name!r}; known: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
