"""The header of a safetensors file, checked by us before any library parses the bytes.

A file is: 8 bytes, the header's length n (little-endian); n bytes of JSON,
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}`; the data.
The library accepts headers of 67 MB, names given twice, empty names and files without tensors.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from hashlib import sha256

from graftory.errors import CorruptAdapterError
from graftory.hub import strict_json
from graftory.schema import Json

Bytes = bytes | memoryview
"""The content of a file, read or mapped."""
MAX_HEADER = 1 << 20
"""Most bytes of a header (1 MiB, about ten thousand tensors)."""
_MAX_NAME = 512
_NAME = re.compile(r"[!-~]+")
"""Visible ASCII: a name that looks like another one, or changes what a terminal shows, is refused."""
_MAX_DIMENSIONS = 8
_MAX_BYTES = 1 << 63
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

    def sha256(self, data: Bytes) -> str:
        """The hash of the tensor's bytes, `data` being the whole file."""
        return sha256(memoryview(data)[self.begin : self.end]).hexdigest()


def read_header(data: Bytes, where: str) -> tuple[StoredTensor, ...]:
    """Check a safetensors file and list its tensors in the order of their bytes.

    Args:
        data: The whole file.
        where: Its name, for the error text.

    Raises:
        CorruptAdapterError: If the header is longer than 1 MiB or than the file, is not strict JSON,
            gives a name twice or one that is no module's, lists no tensor, an unknown dtype or an impossible
            shape, or if the tensors overlap, leave holes, or do not end where the file ends.
    """
    return parse_header(data, len(data), where)


def header_bytes(start: Bytes, where: str) -> int:
    """How many bytes the header takes with its length before it, told by the first eight bytes of a file.

    Raises:
        CorruptAdapterError: If there are fewer, or the header is longer than 1 MiB.
    """
    size = int.from_bytes(start[:8], "little")
    _require(len(start) >= 8, where, "the file is shorter than its header says")
    _require(size <= MAX_HEADER, where, f"a header of {size} bytes, at most {MAX_HEADER} are accepted")
    return 8 + size


def parse_header(head: Bytes, file_size: int, where: str) -> tuple[StoredTensor, ...]:
    """The same from the beginning of a file, before the rest is fetched.

    Args:
        head: The first bytes, the header at least.
        file_size: Bytes of the whole file.
        where: Its name, for the error text.

    Raises:
        CorruptAdapterError: As `read_header`.
    """
    start = header_bytes(head, where)
    _require(start <= min(len(head), file_size), where, "the file is shorter than its header says")
    _require(bytes(head[8:9]) == b"{", where, "the header is not an object, or does not begin with it")
    header: dict[str, Json] = strict_json.loads(bytes(head[8:start]), f"{where} (header)", limit=MAX_HEADER)
    _require(_is_metadata(header.pop("__metadata__", {})), where, "the metadata are not texts")
    _require(bool(header), where, "the file holds no tensor")
    tensors = sorted((_entry(name, row, start, where) for name, row in header.items()), key=lambda t: (t.begin, t.end))
    position = start
    for tensor in tensors:
        _require(tensor.begin == position, where, f"tensor {tensor.name!r} overlaps another or leaves a hole before it")
        position = tensor.end
    _require(position == file_size, where, f"the tensors end at byte {position}, the file at {file_size}")
    return tuple(tensors)


def _entry(name: str, row: Json, start: int, where: str) -> StoredTensor:
    _require(_is_name(name), where, f"{name!r:.80} cannot name a tensor")
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
    # what readers multiply must not overflow, not even where a zero comes after it
    whole = math.prod(max(size, 1) for size in shape) * ITEM_BYTES[dtype]
    _require(max(whole, end) < _MAX_BYTES, where, f"tensor {name!r}: shape {shape!r:.80} or offsets overflow")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    _require(
        end - begin == expected, where, f"tensor {name!r}: {end - begin} bytes, its shape and dtype need {expected}"
    )
    return StoredTensor(name, dtype, tuple(shape), start + begin, start + end)


def _is_name(name: str) -> bool:
    """Whether a name is a path of modules, and no path of files."""
    plain = len(name) <= _MAX_NAME and _NAME.fullmatch(name) and not set(name) & {"/", "\\"}
    return bool(plain) and all(name.split("."))


def _is_metadata(value: Json) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _naturals(value: Json) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def _require(condition: bool, where: str, problem: str) -> None:
    if not condition:
        raise CorruptAdapterError(f"{where}: {problem}; the file is damaged or forged, get it again")
