"""Texts from a file, as commands take them."""

from __future__ import annotations

from pathlib import Path

from graftory.data import Text
from graftory.errors import DataError


def texts_of(file: Path) -> tuple[Text, ...]:
    """The lines of a file; a tab parts the two texts of a pair.

    Raises:
        DataError: If it cannot be read or has no lines.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(f"cannot read {str(file)!r} ({reason}); give a text file with one text a line") from None
    if not lines:
        raise DataError(f"{str(file)!r} has no lines; give a text file with one text a line")
    return tuple((first, second) if tab else first for first, tab, second in (line.partition("\t") for line in lines))
