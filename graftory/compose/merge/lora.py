"""LoRA adapters as exact updates, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from graftory.compose.merge.base import Body, check_keys, most_common
from graftory.compose.merge.delta import Delta
from graftory.config import LoraConfig


def lora_deltas(body: Body) -> dict[str, Delta]:
    """Each site's update in fp32 as (s B, A): rank, alpha, rsLoRA and patterns are all in the scale s.

    Raises:
        MergeError: If a tensor is missing or unexplained.
    """
    config = cast(LoraConfig, body.config)
    check_keys(body, [f"{path}.lora_{side}.weight" for path in config.targets for side in "AB"])
    return {
        path: Delta(
            body.tensors[f"{path}.lora_B.weight"].float() * config.scale_of(path),
            body.tensors[f"{path}.lora_A.weight"].float(),
        )
        for path in config.targets
    }


def lora_body(deltas: Mapping[str, Delta], dropout: float) -> Body:
    """Updates as the body of a LoRA adapter of scale 1: alpha = rank at every site, patterns where ranks differ."""
    ranks = {path: delta.rank for path, delta in deltas.items()}
    rank = most_common(list(ranks.values()))
    other = {path: value for path, value in ranks.items() if value != rank}
    config = LoraConfig(
        targets=tuple(deltas),
        init_seed=None,
        rank=rank,
        alpha=float(rank),
        dropout=dropout,
        rank_pattern=other,
        alpha_pattern={path: float(value) for path, value in other.items()},
    )
    tensors = {
        f"{path}.lora_{side}.weight": tensor.contiguous()
        for path, delta in deltas.items()
        for side, tensor in (("A", delta.right), ("B", delta.left))
    }
    return Body("the merged adapter", config, tensors)
