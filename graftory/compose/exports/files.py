"""The tensors of a base model where they lie: their shapes at once, their numbers one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from graftory.errors import DataError
from graftory.hub.safetensors_header import StoredTensor, header_bytes, parse_header

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""What safetensors calls the types."""
_NAMES = (("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
"""One file, or the index of many; the first that is there."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a tensor lie, one behind the other."""

    file: Path
    offset: int


@dataclass(frozen=True, slots=True)
class Lying:
    """A tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Reads it into memory of its own, which may be written to."""
    place: Place | None = None
    """None if it lies in memory, or in a file of another kind than safetensors."""


def lying_tensors(source: str, *, revision: str | None = None) -> dict[str, Lying]:
    """The tensors of a model, by their names in its files.

    Args:
        source: A folder, or an id of the hub, whose files are fetched as transformers does it.
        revision: Commit, tag or branch, for a model of the hub.

    Raises:
        DataError: If there are neither safetensors nor PyTorch files, or one of them cannot be read.
    """
    files = _weight_files(source, revision)
    read = _of_safetensors if files[0].suffix == ".safetensors" else _of_pickle
    return {name: tensor for file in files for name, tensor in read(file)}


def of_memory(named: Mapping[str, Tensor]) -> dict[str, Lying]:
    """Tensors that are in memory already, each read as a copy."""
    return {
        name: Lying(tuple(tensor.shape), tensor.dtype, partial(torch.clone, tensor)) for name, tensor in named.items()
    }


def _weight_files(source: str, revision: str | None) -> list[Path]:
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    def find(name: str) -> str | None:
        found: str | None = cached_file(
            source,
            name,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return found

    for single, index in _NAMES:
        if file := find(single):
            return [Path(file)]
        if file := find(index):
            return sorted(map(Path, get_checkpoint_shard_files(source, file, revision=revision)[0]))
    wanted = ", ".join(name for names in _NAMES for name in names)
    raise DataError(f"{source}: no weights; wanted one of {wanted}")


def _of_safetensors(file: Path) -> Iterator[tuple[str, Lying]]:
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            head = start + stream.read(header_bytes(start, str(file)) - 8)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); get the base model again") from None
    for entry in parse_header(head, file.stat().st_size, str(file)):
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise DataError(f"{file}: {entry.name} is of type {entry.dtype}, wanted one of {', '.join(DTYPES)}")
        yield entry.name, Lying(entry.shape, dtype, partial(_read, file, entry, dtype), Place(file, entry.begin))


def _read(file: Path, entry: StoredTensor, dtype: torch.dtype) -> Tensor:
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    # its pages are given back with the tensor; those of a mapped file would stay until the file is closed
    data = bytearray(entry.end - entry.begin)
    with file.open("rb") as stream:
        stream.seek(entry.begin)
        if stream.readinto(data) != len(data):
            raise DataError(f"{file}: is shorter than it says; get the base model again")
    return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)


def _of_pickle(file: Path) -> Iterator[tuple[str, Lying]]:
    """PyTorch's own files, mapped; nothing in them is run."""
    for name, tensor in torch.load(file, map_location="cpu", mmap=True, weights_only=True).items():
        yield name, Lying(tuple(tensor.shape), tensor.dtype, partial(_copy, tensor))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def largest(tensors: Sequence[Lying]) -> int:
    """Bytes of the largest."""
    return max((size_of(tensor.shape, tensor.dtype) for tensor in tensors), default=0)


def size_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return int(torch.Size(shape).numel()) * dtype.itemsize
