"""What several REF arguments must be to each other."""

from __future__ import annotations

from collections.abc import Iterable

from graftory.errors import ConfigError


def check_distinct(given: Iterable[tuple[str, str]]) -> None:
    """Refuse what is given twice.

    Args:
        given: What may not be the same, and what it is called.

    Raises:
        ConfigError: If two are the same.
    """
    seen: dict[str, str] = {}
    for key, name in given:
        if key in seen:
            raise ConfigError(f"{name} is the same adapter as {seen[key]}; give each once")
        seen[key] = name
