"""The header of a safetensors file, checked by us before any library parses the bytes.

A file is: 8 bytes, the header's length n (little-endian); n bytes of JSON,
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}`; the data.
The library accepts headers of 67 MB, names given twice, empty names and files without tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import sha256

from graftory.errors import CorruptAdapterError
from graftory.hub import strict_json
from graftory.schema import Json

MAX_HEADER = 1 << 20
"""Most bytes of a header (1 MiB, about ten thousand tensors)."""
_MAX_NAME = 512
_MAX_DIMENSIONS = 8
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""Bytes of one element of each known dtype."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: what it is and where its bytes lie (counted from the file's start)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def sha256(self, data: bytes) -> str:
        """The hash of the tensor's bytes, `data` being the whole file."""
        return sha256(memoryview(data)[self.begin : self.end]).hexdigest()


def read_header(data: bytes, where: str) -> tuple[StoredTensor, ...]:
    """Check a safetensors file and list its tensors in the order of their bytes.

    Args:
        data: The whole file.
        where: Its name, for the error text.

    Raises:
        CorruptAdapterError: If the header is longer than 1 MiB or than the file, is not strict JSON,
            gives a name twice or an empty one, lists no tensor, an unknown dtype or an impossible
            shape, or if the tensors overlap, leave holes, or do not end where the file ends.
    """
    size = int.from_bytes(data[:8], "little")
    _require(len(data) >= 8 and size <= len(data) - 8, where, "the file is shorter than its header says")
    _require(size <= MAX_HEADER, where, f"a header of {size} bytes, at most {MAX_HEADER} are accepted")
    header = strict_json.loads(data[8 : 8 + size], f"{where} (header)", limit=MAX_HEADER)
    _require(isinstance(header, dict), where, "the header is not an object")
    header.pop("__metadata__", None)
    _require(bool(header), where, "the file holds no tensor")
    tensors = sorted(
        (_entry(name, row, 8 + size, where) for name, row in header.items()), key=lambda t: (t.begin, t.end)
    )
    position = 8 + size
    for tensor in tensors:
        _require(tensor.begin == position, where, f"tensor {tensor.name!r} overlaps another or leaves a hole before it")
        position = tensor.end
    _require(position == len(data), where, f"the tensors end at byte {position}, the file at {len(data)}")
    return tuple(tensors)


def _entry(name: str, row: Json, start: int, where: str) -> StoredTensor:
    _require(0 < len(name) <= _MAX_NAME and name.isprintable(), where, f"{name!r:.80} cannot name a tensor")
    _require(
        isinstance(row, dict) and set(row) == {"dtype", "shape", "data_offsets"},
        where,
        f"tensor {name!r}: a broken entry",
    )
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    _require(isinstance(dtype, str) and dtype in ITEM_BYTES, where, f"tensor {name!r}: unknown dtype {dtype!r:.40}")
    _require(
        _naturals(shape) and len(shape) <= _MAX_DIMENSIONS, where, f"tensor {name!r}: impossible shape {shape!r:.80}"
    )
    _require(_naturals(offsets) and len(offsets) == 2, where, f"tensor {name!r}: impossible offsets {offsets!r:.80}")
    begin, end = offsets
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    _require(
        end - begin == expected, where, f"tensor {name!r}: {end - begin} bytes, its shape and dtype need {expected}"
    )
    return StoredTensor(name, dtype, tuple(shape), start + begin, start + end)


def _naturals(value: Json) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def _require(condition: bool, where: str, problem: str) -> None:
    if not condition:
        raise CorruptAdapterError(f"{where}: {problem}; the file is damaged or forged, get it again")
