"""The order of training rows: random, but rows of like length go together, so that little is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_WINDOW = 20


class LengthSampler(Sampler[int]):
    """Shuffles all rows, sorts them by length within windows of 20 batches, then shuffles the batches.

    The order depends on the seed and the epoch alone, so a resumed epoch sees the rows it would have seen.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows a batch, of all processes together.
        seed: Decides the order.
        filled: Whether a short last batch is filled with the number behind that of the last row.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, *, filled: bool = False) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.missing = -len(lengths) % batch_size if filled else 0
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths) + self.missing

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        rows = torch.randperm(len(self.lengths), generator=generator).tolist()
        window = _WINDOW * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(rows), window):
            near = sorted(rows[start : start + window], key=lambda row: self.lengths[row])
            batches += [near[at : at + self.batch_size] for at in range(0, len(near), self.batch_size)]
        # the one short batch, if any, stays last: in front it would shift the borders of all others
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        order = torch.randperm(len(batches), generator=generator).tolist()
        for batch in [*(batches[number] for number in order), *last]:
            yield from batch
        yield from [len(self.lengths)] * self.missing
