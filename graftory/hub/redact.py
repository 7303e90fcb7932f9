"""Texts without the secrets in them, for errors, logs and cards."""

from __future__ import annotations

import os
import re
from urllib.parse import quote, quote_plus

HIDDEN = "***"

_VARIABLES = re.compile(
    r"(?:^|_)TOKEN(?:_|$)|SECRET|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|ACCOUNT_KEY|STORAGE_KEY|API_KEY"
    r"|CONNECTION_STRING|SAS_TOKEN"
)
"""Names of environment variables whose values are secrets."""
_PLACES = re.compile(r"_(?:FILE|PATH|DIR|URI|URL)$|^GOOGLE_APPLICATION_CREDENTIALS$")
"""Names of those that say where a secret lies: an error about that place must be readable."""
_SHORTEST = 8
"""A shorter value is no secret, and would take words out of ordinary texts."""


def _row(pattern: str, instead: str = HIDDEN) -> tuple[re.Pattern[str], str]:
    return re.compile(pattern, re.IGNORECASE), instead


_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # private keys in PEM
    _row(r"-----BEGIN [A-Z ]{0,32}PRIVATE KEY-----[^-]*(?:-----END [A-Z ]{0,32}PRIVATE KEY-----)?"),
    # whatever follows the name of the header, to the end of its line or quotes
    _row(r"(\bauthorization['\"]?[ \t]{0,8}[:=][ \t]{0,8}['\"]?)[^\s'\"*][^\r\n'\"]*", rf"\1{HIDDEN}"),
    # credentials after their scheme, not words
    _row(r"\b(bearer|basic)([ ]{1,8})(?:(?=[a-z._~+/-]{0,80}[0-9=])[\w.~+/=-]{8,}|[\w.~+/=-]{16,})", rf"\1\2{HIDDEN}"),
    _row(r"(?<![A-Za-z0-9])eyJ[A-Za-z0-9_.-]{20,}"),  # signed tokens: {" in base64
    _row(r"hf_(?:[a-z]{1,8}_)?[A-Za-z0-9]{16,}"),
    # the names of AWS keys
    (re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"), HIDDEN),
    # users and passwords in addresses; the second with a slash in the password, the port of a host is none
    _row(r"(://)[^/?#\s]*@", rf"\1{HIDDEN}@"),
    _row(r"(://)[^\s@/:]+:(?![0-9]{1,5}/)(?:(?!://)[^\s@])+@", rf"\1{HIDDEN}@"),
    # signed addresses
    _row(
        r"((?:x-amz-|x-goog-)(?:signature|credential|security-token)['\"]?[=:][ ]{0,8}['\"]?)[^&\s\"'<>]+",
        rf"\1{HIDDEN}",
    ),
    _row(
        r"([?&;](?:signature|awsaccesskeyid|googleaccessid|key-pair-id|policy|sig|[a-z_]{0,32}token)=)[^&\s\"'<>]+",
        rf"\1{HIDDEN}",
    ),
    _row(r"\b((?:accountkey|sharedaccesssignature|sharedaccesskey)=)[^;\s\"'<>]+", rf"\1{HIDDEN}"),
)
"""What a secret looks like, and what stands in its place. Each takes a time linear in the text."""


def redact(text: str) -> str:
    """A text without tokens, passwords, keys and signed query values.

    Hidden are the values of the environment's secrets (`HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`, ...), as they
    are and as they stand in addresses, and whatever looks like a secret, wherever it came from.
    """
    for value in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return hide_shapes(text)


def hide_shapes(text: str) -> str:
    """A text without what looks like a secret; the same whatever is in the environment."""
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def _secrets() -> set[str]:
    values = [
        value
        for name, value in os.environ.items()
        if _VARIABLES.search(name.upper()) and not _PLACES.search(name.upper())
    ]
    long = [value for value in values if len(value) >= _SHORTEST and value.strip("*")]
    return {form for value in long for form in (value, quote(value, safe=""), quote(value), quote_plus(value))}
