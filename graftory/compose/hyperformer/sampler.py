"""The order of rows of several tasks: each batch is of one task, drawn with a temperature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def probabilities(sizes: Sequence[int], temperature: float) -> list[float]:
    """p(task) ∝ rows^(1/T)."""
    weights = torch.tensor(sizes, dtype=torch.float64).pow(1 / temperature)
    shares: list[float] = (weights / weights.sum()).tolist()
    return shares


class TaskSampler(Sampler[int]):
    """Numbers of rows, in batches of one task each; the rows of a task in random order, all before any again.

    An epoch has as many rows as there are. The order depends on the seed and the epoch alone.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, temperature: float, seed: int) -> None:
        self.sizes, self.batch_size, self.seed = list(sizes), batch_size, seed
        self.shares = probabilities(sizes, temperature)
        self.epoch = 0

    def __len__(self) -> int:
        batches = -(-sum(self.sizes) // self.batch_size)
        return batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        starts = [sum(self.sizes[:number]) for number in range(len(self.sizes))]
        waiting: list[list[int]] = [[] for _ in self.sizes]
        drawn = torch.multinomial(
            torch.tensor(self.shares), len(self) // self.batch_size, replacement=True, generator=generator
        )
        for task in drawn.tolist():
            for _ in range(self.batch_size):
                if not waiting[task]:
                    waiting[task] = torch.randperm(self.sizes[task], generator=generator).tolist()
                yield starts[task] + waiting[task].pop()
