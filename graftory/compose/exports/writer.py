"""Sharded safetensors, written one tensor at a time: shapes and types are known before any numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from graftory.compose.exports.files import DTYPES, size_of
from graftory.errors import ConfigError, StorageError
from graftory.progress import Progress

PATTERN = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 1 << 24
"""Bytes handed to the system at a time."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """Makes it when its turn comes: of this shape and type, and not kept."""

    @property
    def size(self) -> int:
        """Its bytes."""
        return size_of(self.shape, self.dtype)


def write_shards(
    folder: Path, planned: Sequence[Planned], *, max_shard_size: int | str, progress: Progress | None = None
) -> tuple[str, ...]:
    """Write tensors as `model.safetensors`, or as shards and their index; the names of the files.

    No more than one tensor is in memory at a time.

    Args:
        folder: An empty folder.
        planned: The tensors, names all different.
        max_shard_size: Bytes, or text such as "5GB"; a tensor above it has a shard of its own.
        progress: Told of every tensor.

    Raises:
        ConfigError: If the size is none.
        StorageError: If the disk cannot take it.
    """
    by_name = {tensor.name: tensor for tensor in planned}
    try:
        split = split_state_dict_into_shards_factory(
            by_name, get_storage_size=lambda each: each.size, filename_pattern=PATTERN, max_shard_size=max_shard_size
        )
    except ValueError:
        raise ConfigError(f"max_shard_size: got {max_shard_size!r}, wanted a size such as 500MB or 5GB") from None
    done, total = 0, sum(tensor.size for tensor in planned)
    for file, names in split.filename_to_tensors.items():
        # wide types first, as safetensors itself does it: so every tensor lies where its type may be read
        shard = sorted((by_name[name] for name in names), key=lambda each: -each.dtype.itemsize)
        try:
            with (folder / file).open("xb") as stream:
                stream.write(_header(shard))
                for tensor in shard:
                    if progress is not None:
                        progress(tensor.name, done, total)
                    _write(stream, tensor)
                    done += tensor.size
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise StorageError(
                f"{folder / file}: cannot be written ({error.strerror}); make room on the disk"
            ) from None
    if progress is not None:
        progress("", total, total)
    if split.is_sharded:
        count = sum(torch.Size(tensor.shape).numel() for tensor in planned)
        index = {"metadata": {"total_parameters": count, **split.metadata}, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return tuple(split.filename_to_tensors)


def _header(shard: Sequence[Planned]) -> bytes:
    entries: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in shard:
        end = begin + tensor.size
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(stream: BinaryIO, planned: Planned) -> None:
    tensor = planned.make()
    if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
        raise AssertionError(f"{planned.name}: {tuple(tensor.shape)} {tensor.dtype}, planned {planned}")
    if tensor.numel():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), _PIECE):
            stream.write(data[start : start + _PIECE])
