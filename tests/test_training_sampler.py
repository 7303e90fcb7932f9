"""The order of training rows."""

from __future__ import annotations

import random

from graftory.training.sampler import LengthSampler

LENGTHS = [random.Random(row).randint(4, 60) for row in range(1003)]


def padded(order: list[int], batch_size: int) -> int:
    """Tokens of all batches, padding included."""
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in batches)


def test_every_row_once_and_little_padding() -> None:
    sampler = LengthSampler(LENGTHS, 8, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(len(LENGTHS))) == list(range(len(sampler)))
    assert padded(order, 8) < 1.1 * sum(LENGTHS)
    assert padded(list(range(len(LENGTHS))), 8) > 1.5 * sum(LENGTHS)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first, second, other = (LengthSampler(LENGTHS, 8, seed) for seed in (0, 0, 1))
    assert list(first) == list(first) == list(second)
    assert list(first) != list(other)
    second.set_epoch(1)
    assert list(first) != list(second)


def test_long_rows_do_not_come_in_order_of_length() -> None:
    order = list(LengthSampler(LENGTHS, 8, seed=0))
    means = [sum(LENGTHS[row] for row in order[start : start + 8]) / 8 for start in range(0, 160, 8)]
    assert means != sorted(means)
