"""LoRA adapters as exact updates, and back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graftory.compose.merge.base import Body, most_common
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.kinds import check_linear, delta_at
from graftory.config import LoraConfig


def lora_deltas(body: Body) -> dict[str, Delta]:
    """The update of a LoRA adapter at each of its sites, in fp32.

    Raises:
        MergeError: If a tensor is missing or unexplained.
    """
    check_linear(body)
    return {path: delta_at(body, path) for path in body.config.targets}


def lora_body(deltas: Mapping[str, Delta], dropout: float) -> Body:
    """Updates as the body of a LoRA adapter of scale 1: alpha = rank at every site, patterns where ranks differ."""
    filled = {path: delta.at_least_one() for path, delta in deltas.items()}
    rank, other = ranks_of(filled)
    config = LoraConfig(
        targets=tuple(filled),
        init_seed=None,
        rank=rank,
        alpha=float(rank),
        dropout=dropout,
        rank_pattern=other,
        alpha_pattern={path: float(value) for path, value in other.items()},
    )
    return Body("the merged adapter", config, factors_of(filled))


def ranks_of(deltas: Mapping[str, Delta]) -> tuple[int, dict[str, int]]:
    """The most common rank, and those that differ from it."""
    ranks = {path: delta.rank for path, delta in deltas.items()}
    rank = most_common(list(ranks.values()))
    return rank, {path: value for path, value in ranks.items() if value != rank}


def factors_of(deltas: Mapping[str, Delta]) -> dict[str, Tensor]:
    """A and B of updates, by their names in an adapter."""
    return {
        f"{path}.lora_{side}.weight": tensor.contiguous()
        for path, delta in deltas.items()
        for side, tensor in (("A", delta.right), ("B", delta.left))
    }
