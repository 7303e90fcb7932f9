"""What libraries of object stores raise, in our words: one line, with a remedy, without a secret."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from graftory.errors import GraftoryError, RemoteError
from graftory.hub.redact import redact

_LONGEST = 200


@dataclass(frozen=True, slots=True)
class _Row:
    """Codes of servers and names of exceptions, and what to say of them."""

    names: frozenset[str]
    text: str


_ROWS = tuple(
    _Row(frozenset(names.split()), text)
    for names, text in (
        (
            "NoSuchBucket ContainerNotFound InvalidBucketName",
            "there is no such bucket; check the name, or make the bucket first with the store's own tools",
        ),
        (
            "NoCredentialsError PartialCredentialsError CredentialRetrievalError ProfileNotFound "
            "DefaultCredentialsError TokenRetrievalError SSOTokenLoadError",
            "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE "
            "(or what your store's own client reads)",
        ),
        (
            "InvalidAccessKeyId SignatureDoesNotMatch InvalidToken ExpiredToken ExpiredTokenException "
            "TokenRefreshRequired AuthenticationFailed ClientAuthenticationError RefreshError 401",
            "the credentials are refused; set other ones in the environment or in your client's configuration",
        ),
        ("RequestTimeTooSkewed", "the clock of this machine is wrong; set it and try again"),
        (
            "PermanentRedirect 301 AuthorizationHeaderMalformed IllegalLocationConstraintException",
            "the bucket lies in another region; set AWS_REGION to it",
        ),
        (
            "AccessDenied AllAccessDisabled Forbidden 403 PermissionError",
            "access is denied; the credentials must be allowed to list and read the objects under this address, "
            "and to create them for a push",
        ),
        (
            "SlowDown ServiceUnavailable InternalError RequestTimeout 500 502 503 504",
            "the server fails or is busy; try again later, it goes on where it was broken off",
        ),
        (
            "EndpointConnectionError ConnectTimeoutError ReadTimeoutError ConnectionClosedError HTTPClientError "
            "ConnectionError ClientConnectorError ClientPayloadError IncompleteRead IncompleteReadError gaierror "
            "FSTimeoutError TimeoutError ServiceRequestError ResponseStreamingError",
            "cannot be reached; check the network and the endpoint (AWS_ENDPOINT_URL), then repeat it: it goes on "
            "where it was broken off",
        ),
    )
)
_OURS = (GraftoryError, TypeError, AttributeError, NameError, AssertionError)
"""Not of a remote: what we raise on purpose, and mistakes of ours, which must be seen."""


@contextmanager
def in_our_words(address: str) -> Iterator[None]:
    """Turn what a library raises within into a `RemoteError` about an address."""
    try:
        yield
    except _OURS:
        raise
    except Exception as error:
        # without its cause: libraries keep the request, with its signature, in theirs
        raise RemoteError(f"{address}: {describe(error)}") from None


def describe(error: BaseException) -> str:
    """What happened and what to do, in one line."""
    names = names_of(error)
    for row in _ROWS:
        known = [name for name in names if name in row.names]
        if known:
            return f"{row.text} ({known[0]})"
    text = " ".join(redact(str(error)).split())[:_LONGEST]
    return f"the store answered {type(error).__name__}: {text}; check the address and try again"


def names_of(error: BaseException) -> tuple[str, ...]:
    """The server's code and the names of the exception's classes, the most exact first."""
    causes = [item for item in (error.__cause__, error) if item is not None]
    codes = [str(code) for code in map(_code, causes) if code]
    classes = [kind.__name__ for item in causes for kind in type(item).__mro__]
    return (*codes, *classes)


def _code(error: BaseException) -> object:
    response = getattr(error, "response", None)  # botocore's
    answer = response.get("Error") if isinstance(response, dict) else None
    if isinstance(answer, dict):
        return answer.get("Code")
    return getattr(error, "error_code", None) or getattr(error, "code", None)  # Azure's, Google's
