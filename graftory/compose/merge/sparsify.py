"""Dropping entries of updates: by magnitude, at random, or at random by magnitude. A row of the table each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graftory.compose.merge.dense import Stack
from graftory.errors import MergeError

Drop = Callable[[Tensor], Tensor]
"""Drops entries of the next block of rows, [T, n, columns]; the blocks must come in order."""


@dataclass(frozen=True, slots=True)
class Sparsity:
    """How much is dropped.

    Attributes:
        density: The share of entries that is kept, above 0 and at most 1.
        spread: `della`: the width of the window of probabilities.
        seed: Of what is drawn.
        where: What is drawn for, so that no two modules drop alike.
    """

    density: float
    spread: float = 0.0
    seed: int = 0
    where: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise MergeError(f"density: got {self.density:g}, wanted above 0 and at most 1: the share that is kept")
        low, high = self.density - self.spread / 2, self.density + self.spread / 2
        if not (self.spread >= 0 and low > 0 and high <= 1):
            raise MergeError(
                f"window: got {self.spread:g} about the density {self.density:g}, so shares of {low:g} to {high:g} are "
                "kept; wanted them above 0 and at most 1"
            )

    def generators(self, count: int) -> list[torch.Generator]:
        """One for each matrix."""
        texts = [f"{self.seed} {self.where} {number}".encode() for number in range(count)]
        seeds = [int.from_bytes(hashlib.sha256(text).digest()[:7], "big") for text in texts]
        return [torch.Generator().manual_seed(seed) for seed in seeds]


def keep_all(_stack: Stack, _sparsity: Sparsity) -> Drop:
    """Drop nothing."""
    return lambda block: block


def by_magnitude(stack: Stack, sparsity: Sparsity) -> Drop:
    """Keep the ⌊density · numel⌋ largest entries of each matrix by magnitude, at least one, and their equals."""
    kept = max(1, int(sparsity.density * stack.shape[0] * stack.shape[1]))
    least = kth_largest(stack, kept)[:, None, None]
    return lambda block: torch.where(block.abs().float() >= least, block, 0)


def at_random(stack: Stack, sparsity: Sparsity) -> Drop:
    """Keep each entry with probability density, divided by it: the expectation stays (DARE)."""
    generators = sparsity.generators(stack.count)

    def drop(block: Tensor) -> Tensor:
        return torch.where(_uniform(block, generators) < sparsity.density, block / sparsity.density, 0)

    return drop


def by_rank(stack: Stack, sparsity: Sparsity) -> Drop:
    """Keep each entry with a probability that rises with its rank by magnitude in its row, divided by it (MagPrune).

    In a row of n entries the one of rank i, from 0 for the smallest, is kept with probability
    density + spread (i / (n − 1) − 1/2). Deep et al. 2024, arXiv:2406.11617.
    """
    generators = sparsity.generators(stack.count)

    def drop(block: Tensor) -> Tensor:
        ranks = block.abs().argsort(dim=-1, stable=True).argsort(dim=-1)
        place = ranks.to(torch.float32) / max(1, block.shape[-1] - 1) - 0.5
        chance = sparsity.density + sparsity.spread * place
        return torch.where(_uniform(block, generators) < chance, block / chance, 0)

    return drop


def _uniform(block: Tensor, generators: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.rand(block.shape[1:], generator=generator) for generator in generators])


Sparsifier = Literal["all", "magnitude", "random", "rank"]
SPARSIFIERS: Mapping[Sparsifier, Callable[[Stack, Sparsity], Drop]] = {
    "all": keep_all,
    "magnitude": by_magnitude,
    "random": at_random,
    "rank": by_rank,
}


def kth_largest(stack: Stack, k: int) -> Tensor:
    """The k-th largest magnitude of each matrix, as fp32, [T]; exact, in two passes over the blocks.

    The bits of non-negative floats have the order of the floats. So the first pass counts their upper halves and
    finds the one that holds the k-th, the second counts the lower halves of those that share it.
    """
    counts = torch.zeros(stack.count, 1 << 16, dtype=torch.int64)
    for block in stack.blocks():
        counts += torch.stack([_histogram(bits >> 16) for bits in _bits(block)])
    upper, left = _find(counts, torch.full((stack.count,), k))
    counts.zero_()
    for block in stack.blocks():
        for number, bits in enumerate(_bits(block)):
            counts[number] += _histogram(bits[bits >> 16 == upper[number]] & 0xFFFF)
    lower, _ = _find(counts, left)
    return ((upper << 16) + lower).to(torch.int32).view(torch.float32)


def _bits(block: Tensor) -> Tensor:
    return block.abs().float().contiguous().view(torch.int32).flatten(1)


def _histogram(values: Tensor) -> Tensor:
    return torch.bincount(values, minlength=1 << 16)


def _find(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The bin of each row that holds its k-th largest, and which it is in there."""
    above = counts.flip(1).cumsum(1)
    place = (above < k[:, None]).sum(1)
    rows = torch.arange(len(counts))
    bins = counts.shape[1] - 1 - place
    return bins, k - (above[rows, place] - counts[rows, bins])
