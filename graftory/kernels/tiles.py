"""Which rows of a batch a block of a kernel works on: rows sorted by adapter, in tiles of one adapter each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """A batch cut into tiles; all on the device, of shapes that depend on those of the batch alone.

    Attributes:
        order: [E], int32: entries sorted by adapter, those without one last. An entry is a token and one of its places.
        offsets: [K + 2], int32: where the entries of each adapter begin in `order`; then those without one, then E.
        adapter: [tiles], int32: whose entries a tile holds; -1 for none.
        start: [tiles], int32: its first position in `order`.
        end: [tiles], int32: the position behind its last. A tile with end = start is empty.
        size: Most entries of a tile.
    """

    order: Tensor
    offsets: Tensor
    adapter: Tensor
    start: Tensor
    end: Tensor
    size: int


def cut(index: Tensor, adapters: int, size: int) -> Tiles:
    """Cut a batch into tiles, without waiting for the device.

    Args:
        index: [E], int64: the adapter of each entry, or -1.
        adapters: K.
        size: Most entries of a tile.
    """
    entries, device = len(index), index.device
    keys = torch.where(index < 0, adapters, index)
    order = torch.argsort(keys, stable=True)
    counts = torch.zeros(adapters + 1, dtype=torch.long, device=device).scatter_add_(0, keys, torch.ones_like(keys))
    ends = counts.cumsum(0)
    tiles = (counts + size - 1) // size
    last = tiles.cumsum(0)
    # every adapter that occurs may leave one tile that is not full
    most = -(-entries // size) + min(adapters + 1, entries)
    number = torch.arange(most, device=device)
    group = torch.searchsorted(last, number, right=True).clamp(max=adapters)
    start = (ends - counts)[group] + (number - (last - tiles)[group]) * size
    there = number < last[-1]
    start = torch.where(there, start, 0)
    end = torch.where(there, torch.minimum(start + size, ends[group]), 0)
    adapter = torch.where(group == adapters, -1, group)
    offsets = torch.cat([ends.new_zeros(1), ends])
    return Tiles(order.int(), offsets.int(), adapter.int(), start.int(), end.int(), size)
