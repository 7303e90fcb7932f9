"""Texts from records, made fit to be shown: whoever wrote a record may have put control characters into it."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text on one line, each character that a terminal might obey replaced by `?`."""
    return "".join(character if character.isprintable() else "?" for character in text)


def shortened(text: str, width: int) -> str:
    """The beginning of a text that is too long."""
    return text if len(text) <= width else f"{text[: width - 1]}…"
