"""How long work tells what is done of it, whoever shows that."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is at hand, what of it is done, and of how much: bytes, files, whatever is counted."""


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""
