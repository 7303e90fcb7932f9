"""What `--method auto` takes; apart from what it does, which loads models."""

from __future__ import annotations

from dataclasses import dataclass

from graftory.compose.merge.base import MergeParameters, check_rank
from graftory.config import option


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoParameters(MergeParameters):
    """Parameters of `auto`."""

    rank: int | None = option("rank of the result; if not given nothing is cut", None)

    def __post_init__(self) -> None:
        check_rank(self.rank)
