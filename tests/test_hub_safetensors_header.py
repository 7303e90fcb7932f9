"""The header check: real files pass with the library's own answers, forged ones are refused."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch
from safetensors.torch import save

from graftory.errors import CorruptAdapterError
from graftory.hub.safetensors_header import MAX_HEADER, read_header


def build(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_the_library_s_files_are_read() -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4, dtype=torch.bfloat16), "s": torch.tensor(2.0)}
    data = save(tensors, metadata={"format": "pt"})
    found = {tensor.name: tensor for tensor in read_header(data, "f")}
    assert {name: tensor.shape for name, tensor in found.items()} == {"a": (4,), "b": (2, 3), "s": ()}
    assert {name: tensor.dtype for name, tensor in found.items()} == {"a": "BF16", "b": "F32", "s": "F32"}
    assert found["b"].sha256(data) == hashlib.sha256(tensors["b"].numpy().tobytes()).hexdigest()


BAD = [
    (b"", "shorter than its header"),
    (b"\x01\x02", "shorter than its header"),
    ((1 << 60).to_bytes(8, "little") + b"{}", "at most 1048576"),
    ((3).to_bytes(8, "little") + b"{}", "shorter than its header"),
    (build(b" " * (MAX_HEADER + 1)), "at most 1048576"),
    (build([]), "not an object"),
    (build({}), "no tensor"),
    (build({"__metadata__": {"format": "pt"}}), "no tensor"),
    (build(b'{"a": 1, "a": 2}'), "given twice"),
    (build({"": entry(0, 1)}, b"x"), "cannot name a tensor"),
    (build({"a\n": entry(0, 1)}, b"x"), "cannot name a tensor"),
    (build({"a" * 513: entry(0, 1)}, b"x"), "cannot name a tensor"),
    (build({"a": entry(0, 1) | {"more": 1}}, b"x"), "broken entry"),
    (build({"a": entry(0, 1, dtype="C64")}, b"x"), "unknown dtype"),
    (build({"a": entry(0, 1, shape=[-1, -1])}, b"x"), "impossible shape"),
    (build({"a": entry(0, 1, shape=[1] * 9)}, b"x"), "impossible shape"),
    (build({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, b"x"), "impossible shape"),
    (build({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"x"), "impossible offsets"),
    (build({"a": entry(0, 2, shape=[3])}, b"xx"), "2 bytes, its shape and dtype need 3"),
    (build({"a": entry(0, 4, shape=[1 << 19, 1 << 19])}, b"xxxx"), "need 274877906944"),
    (build({"a": entry(1, 0, shape=[1])}, b"x"), "-1 bytes"),
    (build({"a": entry(0, 2), "b": entry(1, 3)}, b"xxx"), "overlaps"),
    (build({"a": entry(0, 2), "b": entry(0, 2)}, b"xx"), "overlaps"),
    (build({"a": entry(0, 1), "b": entry(2, 3)}, b"xxx"), "hole"),
    (build({"a": entry(0, 2)}, b"xxx"), "the tensors end at byte"),
    (build({"a": entry(0, 2)}, b"x"), "the tensors end at byte"),
]


@pytest.mark.parametrize(("data", "text"), BAD, ids=range(len(BAD)))
def test_refused(data: bytes, text: str) -> None:
    with pytest.raises(CorruptAdapterError, match=f"^f.*{text}"):
        read_header(data, "f")


def test_every_truncation_is_refused() -> None:
    data = save({"a": torch.ones(3), "b": torch.ones(2, 2)})
    for length in range(len(data)):
        with pytest.raises(CorruptAdapterError):
            read_header(data[:length], "f")
