"""What tests of kernels under Triton's interpreter share: outputs that are watched, numbers counted, masks broken."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

GUARD = 64
"""Numbers behind every output that no kernel may touch."""


@contextmanager
def guarded(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs start as NaN, so what is not written shows, and what lies behind them is looked at in the end."""
    made: list[tuple[Tensor, int]] = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = int(torch.Size(shape).numel())
        memory = torch.full((count + GUARD,), float("nan"), dtype=dtype, device=device)
        made.append((memory, count))
        return memory[:count].view(shape)

    monkeypatch.setattr(launch, "empty", empty)
    yield
    assert made
    assert all(memory[count:].isnan().all() for memory, count in made)


def give_room(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Much room behind every output, so that a broken kernel damages nothing."""

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = int(torch.Size(shape).numel())
        return torch.zeros(2 * count + 100_000, dtype=dtype, device=device)[:count].view(shape)

    monkeypatch.setattr(launch, "empty", empty)


def poisoned(tensor: Tensor) -> Tensor:
    """The same numbers, with NaN behind each row and behind the last."""
    wide = torch.full(
        (*tensor.shape[:-1], tensor.shape[-1] + 5), float("nan"), dtype=tensor.dtype, device=tensor.device
    )
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def worst(errors: Sequence[float]) -> float:
    """The largest error; NaN if one is, which Python's `max` steps over where it is not the first."""
    return float(torch.tensor(errors).max())


def mutations(source: Path, masks: Sequence[str]) -> list[tuple[str, int]]:
    """Each occurrence of each mask."""
    text = source.read_text()
    return [(mask, number) for mask in masks for number in range(text.count(mask))]


def broken(text: str, mask: str, number: int) -> str:
    """The source with the n-th occurrence of a mask always true; its condition is what precedes its first bracket."""
    parts = text.split(mask)
    head, tail = mask.join(parts[: number + 1]), mask.join(parts[number + 1 :])
    condition = mask.removeprefix("mask=").split("[")[0]
    return head + mask.replace(condition, f"({condition} | True)") + tail


def load(text: str, folder: Path) -> ModuleType:
    """Kernels of that source."""
    path = folder / "mutant.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Meter:
    """What kernels read and write, number by number, and what they have to."""

    seen: list[tuple[int, int]] = field(default_factory=list)
    due: list[tuple[int, int]] = field(default_factory=list)
    reads: int = 0
    writes: int = 0

    @contextmanager
    def call(self, reads: int, writes: int) -> Iterator[None]:
        """One launch, and what it may read and write."""
        self.reads = self.writes = 0
        yield
        self.seen.append((self.reads, self.writes))
        self.due.append((reads, writes))


def metered(monkeypatch: pytest.MonkeyPatch) -> Meter:
    """Counts the lanes of every load and store."""
    from triton.runtime.interpreter import InterpreterBuilder

    found = Meter()
    read, write = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        found.reads += int(mask.data.sum())
        return read(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found.writes += int(mask.data.sum())
        return write(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    return found
