"""Bottlenecks whose matrices are made of other weights whenever they are used: what such a method says of itself.

A site keeps the weights themselves; in a mixed batch what they make lies beside plain bottlenecks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor

from graftory.config import BottleneckConfig

DOWN, DOWN_BIAS, UP, UP_BIAS = BottleneckConfig.parts


class Expanded(Mapping[str, Tensor]):
    """The weights of one site by part, and D, c, U and e, made from them whenever they are asked for.

    Args:
        own: What the site has.
        shared: What the first site of the adapter has for all, by the parts in `shares`.
    """

    shares: ClassVar[tuple[str, ...]]
    """The parts that only the first site of an adapter has."""

    def __init__(self, own: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> None:
        self.own, self.shared = own, shared

    @staticmethod
    @abstractmethod
    def shapes(config: Any, path: str, width: int) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the tensors of a site of a width, by part."""

    @abstractmethod
    def make(self, part: str) -> Tensor:
        """D, c, U or e."""

    def standing_in(self, own: Mapping[str, Tensor]) -> Expanded:
        """The same of other tensors."""
        return type(self)(own, {part: own.get(part, value) for part, value in self.shared.items()})

    def __getitem__(self, part: str) -> Tensor:
        return self.own[part] if part in self.own else self.make(part)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*BottleneckConfig.parts, *self.own)))

    def __len__(self) -> int:
        return len(set(self.own) | set(BottleneckConfig.parts))
