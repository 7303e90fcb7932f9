"""single: every task learnt alone, its id given. The upper bound of what an adapter of this size can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftory.continual.strategies.base import Needs
from graftory.continual.strategies.isolated import Isolated


@dataclass(frozen=True, slots=True, kw_only=True)
class Single(Isolated):
    """`isolated` without a router: its R_jj are the S_j of Transfer."""

    title: ClassVar[str] = "bound: each task alone, its id given"
    stores: ClassVar[str] = "adapter"
    needs: ClassVar[Needs] = Needs(("task",), methods=("lora", "bottleneck", "smop"))
    routable: ClassVar[bool] = False
