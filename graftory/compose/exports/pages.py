"""A model whose numbers stay in files: pages of them are in memory while a layer uses them, and not afterwards.

The files of weights are mapped, and transformers builds the model on the mapped tensors. After each layer the system
is told that its pages are wanted no more (`madvise`): it drops them, and maps them again when they are next read, from
its file cache as long as there is room for that. So a model takes the memory of its largest layer, whatever its size.
Numbers that are not fp32 in the files are written to a file of their own in fp32 first, a tensor at a time.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftory.compose.exports.files import Lying
from graftory.errors import StorageError
from graftory.training.base import check_shapes, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALIGNED = 64
"""Bytes that every tensor of a file made here starts at a multiple of."""
_GIVE_BACK: int | None = getattr(mmap, "MADV_DONTNEED", None)
"""None where the system cannot be told; there the pages stay until it wants them back itself."""


class Pages:
    """Files that are mapped, and given back page by page.

    Nobody may write into the tensors: what is written would be lost with the next page that is given back.

    Args:
        files: Tensors by their names in the files.
        scratch: A folder for numbers in fp32, which must outlive the tensors.
    """

    def __init__(self, files: Mapping[str, Lying], scratch: Path) -> None:
        self._files = files
        self._scratch = scratch
        self._maps: dict[Path, mmap.mmap] = {}
        self._tensors: dict[str, Tensor] | None = None

    def load(
        self, build: type[PreTrainedModel], config: Any, fresh: Mapping[str, Tensor] | None = None, *, seed: int = 0
    ) -> PreTrainedModel:
        """A model in fp32, made by transformers alone, as if it had read the files itself.

        Args:
            build: Its class.
            config: Its configuration, which stays as it is.
            fresh: Tensors that the files lack, by their names in the model; what is in neither is drawn.
            seed: What it is drawn with.
        """
        state = {**self.tensors(), **(fresh or {})}
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            options: dict[str, Any] = {"dtype": torch.float32, "config": copy.deepcopy(config), "state_dict": state}
            # a head of the base's own is nobody's here, whatever its size
            loaded: Any = build.from_pretrained(None, ignore_mismatched_sizes=True, output_loading_info=True, **options)
            model: PreTrainedModel = loaded[0]
            check_shapes(config.name_or_path, model, loaded[1])
        self.give_back()

        def used(*_: object) -> None:  # a function, as heads are copied with their hooks, and a method has its object
            self.give_back()

        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_hook(used)
        return model.eval()  # type: ignore[no-any-return, no-untyped-call, unused-ignore]

    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors as mapped pages, in fp32 if they are floating-point numbers."""
        if self._tensors is None:
            whole = {name: lying for name, lying in self._files.items() if not lying.dtype.is_floating_point}
            ready = {name: lying for name, lying in self._files.items() if _is_ready(lying)}
            others = {name: one for name, one in self._files.items() if name not in whole and name not in ready}
            self._tensors = {name: lying.read() for name, lying in whole.items()} | self._converted(others)
            for name, lying in ready.items():
                assert lying.place is not None
                self._tensors[name] = self._mapped(lying.place.file, lying.place.offset, lying)
        return self._tensors

    def give_back(self) -> None:
        """Drop the pages that are in memory; they come back when they are read."""
        if _GIVE_BACK is not None:
            for mapped in self._maps.values():
                mapped.madvise(_GIVE_BACK)

    def _converted(self, files: Mapping[str, Lying]) -> dict[str, Tensor]:
        """Tensors in a file of fp32 of their own."""
        if not files:
            return {}
        path = self._scratch / "numbers"
        starts: dict[str, int] = {}
        try:
            with path.open("xb") as stream:
                for name, lying in files.items():
                    stream.write(bytes(-stream.tell() % _ALIGNED))
                    starts[name] = stream.tell()
                    numbers = lying.read().to(torch.float32).contiguous()
                    stream.write(numbers.reshape(-1).numpy().data)
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be written ({error.strerror}); the check needs room on the disk for the model in fp32"
            ) from None
        return {name: self._mapped(path, start, files[name]) for name, start in starts.items()}

    def _mapped(self, file: Path, offset: int, lying: Lying) -> Tensor:
        count = torch.Size(lying.shape).numel()
        if count == 0:
            return torch.empty(lying.shape)
        if file not in self._maps:
            with file.open("rb") as stream:
                # a private copy: torch wants memory that it may write to, and the file must not change
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(self._maps[file], dtype=torch.float32, count=count, offset=offset).reshape(lying.shape)


def _is_ready(lying: Lying) -> bool:
    """Whether a tensor can be used as it lies in its file."""
    return lying.dtype == torch.float32 and lying.place is not None and lying.place.offset % lying.dtype.itemsize == 0
