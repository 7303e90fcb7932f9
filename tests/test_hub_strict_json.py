"""JSON from strangers: what is taken and what is refused."""

from __future__ import annotations

import pytest

from graftory.errors import CorruptAdapterError
from graftory.hub import strict_json


def test_ordinary_json_is_read() -> None:
    data = '{"a": [1, -2.5, true, null, "[[[{\\"é"], "b": {}}'.encode()
    assert strict_json.loads(data, "f") == {"a": [1, -2.5, True, None, '[[[{"é'], "b": {}}


BAD = [
    (b'{"a": 1, "a": 2}', "given twice"),
    (b'{"x": {"a": 1, "a": 1}}', "given twice"),
    (b"[NaN]", "NaN"),
    (b"[-Infinity]", "Infinity"),
    (b"[1e999]", "overflows"),
    (b"[" + b"9" * 5000 + b"]", "5000 digits"),
    (b"[" * 33 + b"]" * 33, "deeper than 32"),
    (b"[" * 100_000, "deeper than 32"),
    (b'{"a": 1', "not acceptable JSON"),
    (b"", "not acceptable JSON"),
    (b"\xff\xfe{}", "utf-8"),
    (b'\xef\xbb\xbf{"a": 1}', "BOM"),
]


@pytest.mark.parametrize(("data", "text"), BAD, ids=range(len(BAD)))
def test_refused(data: bytes, text: str) -> None:
    with pytest.raises(CorruptAdapterError, match=f"^f: .*{text}"):
        strict_json.loads(data, "f")


def test_limits_are_inclusive() -> None:
    assert strict_json.loads(b"[" * 32 + b"]" * 32, "f") is not None
    assert strict_json.loads(b"[1]", "f", limit=3) == [1]
    with pytest.raises(CorruptAdapterError, match="4 bytes of JSON, at most 3"):
        strict_json.loads(b"[12]", "f", limit=3)
