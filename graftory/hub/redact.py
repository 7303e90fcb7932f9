"""Texts of libraries without the secrets in them, for errors and logs."""

from __future__ import annotations

import os
import re

HIDDEN = "***"

_VARIABLES = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|ACCOUNT_KEY|STORAGE_KEY|API_KEY|CONNECTION_STRING"
)
"""Names of environment variables whose values are secrets."""
_SHORTEST = 8
"""A shorter value is no secret, and would take words out of ordinary texts."""

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\bhf_[A-Za-z0-9_-]{8,}"), HIDDEN),
    (re.compile(r"\b(Bearer|Basic)( +)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\1\2{HIDDEN}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
    (re.compile(r"(://)[^/?#\s@]{1,512}@"), rf"\1{HIDDEN}@"),
    (
        re.compile(
            r"([?&](?:X-Amz-[A-Za-z-]{1,32}|Signature|AWSAccessKeyId|Key-Pair-Id|Policy|sig|token|access_token)=)[^&\s\"'<>]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
)
"""What a secret looks like, and what stands in its place. Each takes a time linear in the text."""


def redact(text: str) -> str:
    """A text without tokens, passwords, keys and signed query values.

    Hidden are the values of the environment's secrets (`HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`, ...) and whatever
    looks like one, wherever it came from.
    """
    for value in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def _secrets() -> set[str]:
    return {
        value for name, value in os.environ.items() if len(value) >= _SHORTEST and _VARIABLES.search(name.upper())
    } - {HIDDEN}
