"""Which adapter each row of a batch uses, and how kernels go through it: made once, used by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from graftory.kernels.gather import any_of
from graftory.kernels.shapes import check, check_shape
from graftory.kernels.tiles import Tiles, cut

_KEPT = 16
"""Shapes whose tiles are kept."""


class Units(NamedTuple):
    """The units of the adapters that all rows use, none behind a true rank: U of them.

    Attributes:
        adapter: Whose each is, [U].
        rank: Which of that one's, [U].
        place: At which place of a row that one is, [U].
    """

    adapter: Tensor
    rank: Tensor
    place: Tensor


class Routing:
    """The choices of a batch. On a GPU, to sort a batch by adapter costs more than a layer of many: it is kept here.

    Hand the same one to all layers of a forward, and nothing is sorted twice; its backward uses it too. Do not write to
    `index` afterwards. In a CUDA graph that is to see new choices, make it inside of what is captured.

    Args:
        index: Adapter of each row, [N], or adapters, [N, M], int64; -1 for none.
        full: Whether it is known that no place is without one. On the CPU that is looked up; a GPU would be waited for.
        alike: Whether it is known that all rows have the same adapters, no place being without one.
    """

    def __init__(self, index: Tensor, *, full: bool = False, alike: bool = False) -> None:
        self.index = index
        self.full = full or alike
        self.alike = alike and index.numel() > 0
        self.places = (index if index.dim() == 2 else index[:, None]).contiguous()
        """[N, M], in one piece."""
        self._tiles: dict[tuple[int, int, int], Tiles] = {}
        self._units: dict[tuple[int, ...], Units] = {}

    @cached_property
    def unused(self) -> Tensor | None:
        """Which places have no adapter, [N, M]; None where it is known that there are none. See `any_of`."""
        if self.full:
            return None
        unused = self.places < 0
        return unused if any_of(unused) else None

    @cached_property
    def own(self) -> Tensor | None:
        """The adapter of each row, [N], where it is known that each row has one, and only one."""
        return self.places[:, 0] if self.places.shape[1] == 1 and self.unused is None else None

    def one_for_all(self, adapters: int) -> bool:
        """Whether it is known that every row uses the only adapter there is: then it takes no gathering."""
        return adapters == 1 and self.own is not None

    def plain(self, x: Tensor, adapters: int) -> bool:
        """Whether a GPU is to take plain products, as one adapter serves all. A compiler's node has the index alone."""
        return x.is_cuda and not torch.compiler.is_compiling() and self.one_for_all(adapters)

    def units(self, ranks: Sequence[int], most: int) -> Units:
        """Where all rows have the same adapters, the units of these; on the CPU.

        Args:
            ranks: At each place.
            most: R.
        """
        key = (*ranks, most)
        if key not in self._units:
            unit = torch.arange(most)
            place = torch.repeat_interleave(torch.tensor(ranks))
            self._units[key] = Units(self.places[0, place], torch.cat([unit[:own] for own in ranks]), place)
        return self._units[key]

    def tiles(self, tokens: int, adapters: int, size: int) -> Tiles:
        """The entries, a row's T tokens times its M places, cut for a kernel. See `tiles.cut`."""
        key = tokens, adapters, size
        if key not in self._tiles:
            if len(self._tiles) == _KEPT:  # generation without a cache has another length at every step
                self._tiles.pop(next(iter(self._tiles)))
            self._tiles[key] = cut(self.entries(tokens), adapters, size)
        return self._tiles[key]

    def entries(self, tokens: int) -> Tensor:
        """The adapter of each entry, [N T M]."""
        every: Tensor = self.places[:, None].expand(-1, tokens, -1)
        return every.flatten()


def routing_of(index: Tensor | Routing, rows: int) -> Routing:
    """As it is, or made.

    Raises:
        ValueError: If it is not that of so many rows.
    """
    routing = index if isinstance(index, Routing) else Routing(index)
    index = routing.index
    check(index.dim() in (1, 2), "index: wanted [rows] or [rows, places]")
    check_shape("index", index, (rows, *index.shape[1:]))
    return routing
