"""Checks of parameters, and of a strategy against what it is asked to do."""

from __future__ import annotations

from graftory.errors import ConfigError


def at_least(least: float, **values: float) -> None:
    """Check that numbers are finite and not too small.

    Raises:
        ConfigError: If one is not.
    """
    for name, value in values.items():
        if not least <= value < float("inf"):
            raise ConfigError(f"{name}: got {value}, wanted {least:g} or more")


def share(**values: float) -> None:
    """Check that numbers are more than 0 and at most 1.

    Raises:
        ConfigError: If one is not.
    """
    for name, value in values.items():
        if not 0 < value <= 1:
            raise ConfigError(f"{name}: got {value}, wanted more than 0 and at most 1")
