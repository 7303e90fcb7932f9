"""Text that strangers typed, made fit for a model card: it shows as it stands and cannot be anything else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from graftory.hub.redact import hide_shapes

_LONGEST = 300
_TAME = re.compile(r"[\w .,:;@/+=%()…'-]+")
"""Nothing that Markdown, HTML or a table would make something of, between backticks."""
_FOLDERS = re.compile(
    r"(?<![\w:/\\.~-])(?:(?:[\\/](?:[^\\/\s'\",;]+[\\/])+)|(?:(?:~|[A-Za-z]:)[\\/](?:[^\\/\s'\",;]+[\\/])*))"
)
"""The folders of a path that only its owner has."""
_LINK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(?:/[A-Za-z0-9][A-Za-z0-9_.-]*)?")


def line(text: str) -> str:
    """One printable line, not too long, without what looks like a secret and without folders of somebody's machine."""
    tidy = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    tidy = _FOLDERS.sub("…/", hide_shapes(tidy))
    return tidy if len(tidy) <= _LONGEST else f"{tidy[:_LONGEST]}…"


def code(text: str) -> str:
    """Text as it stands, as code in a line or a table."""
    tidy = line(text)
    if not tidy:
        return "–"
    if _TAME.fullmatch(tidy):
        return f"`{tidy}`"
    return f"<code>{''.join(c if c.isalnum() or c in ' -' else f'&#{ord(c)};' for c in tidy)}</code>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are fit already."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def is_hub_id(text: str, *, with_owner: bool = True) -> bool:
    """Whether the Hugging Face Hub could have a model or data set of this id; folders and samples have none.

    Args:
        text: The id.
        with_owner: Whether it must be `owner/name`; a few old models are `name` alone.
    """
    fits = _LINK.fullmatch(text) and len(text) <= 96 and "--" not in text and ".." not in text
    return bool(fits) and not text.endswith((".git", ".", "-")) and ("/" in text or not with_owner)
