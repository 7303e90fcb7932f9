"""Sums of bottleneck outputs, exactly, as one wider bottleneck: hidden units side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from graftory.compose.merge.base import Body, check_keys, most_common, union_of_targets
from graftory.config import BottleneckConfig
from graftory.errors import MergeError

_PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


def concatenate(bodies: Sequence[Body], weights: Sequence[float]) -> Body:
    """Σ w_t s_t (U_t act(D_t h + c_t) + e_t) as one bottleneck of Σ size_t hidden units and scale 1.

    Exact, because the activation works unit by unit: D and c are stacked, U is stacked with w_t s_t
    folded in, and e is summed.

    Raises:
        MergeError: If placement, activation or a site's width differ.
    """
    configs = [cast(BottleneckConfig, body.config) for body in bodies]
    for what, values in (
        ("placement", {config.placement for config in configs}),
        ("activation", {config.activation for config in configs}),
    ):
        if len(values) > 1:
            raise MergeError(f"bottleneck adapters of different {what} ({', '.join(sorted(values))}) have no exact sum")
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for body in bodies:
        check_keys(body, [f"{site}.adapter_{part}" for site in body.config.targets for part in _PARTS])
    for site in union_of_targets(bodies):
        here = [
            ({part: body.tensors[f"{site}.adapter_{part}"].float() for part in _PARTS}, weight * config.scale)
            for body, config, weight in zip(bodies, configs, weights, strict=True)
            if site in config.targets
        ]
        widths = {parts["up.bias"].shape[0] for parts, _ in here}
        if len(widths) > 1:
            raise MergeError(f"{site}: adapters of widths {sorted(widths)}; are they of one base model?")
        merged = {
            "down.weight": torch.cat([parts["down.weight"] for parts, _ in here]),
            "down.bias": torch.cat([parts["down.bias"] for parts, _ in here]),
            "up.weight": torch.cat([factor * parts["up.weight"] for parts, factor in here], dim=1),
            "up.bias": torch.stack([factor * parts["up.bias"] for parts, factor in here]).sum(0),
        }
        sizes[site] = merged["down.bias"].shape[0]
        tensors |= {f"{site}.adapter_{part}": tensor for part, tensor in merged.items()}
    size = most_common(list(sizes.values()))
    config = BottleneckConfig(
        targets=tuple(sizes),
        init_seed=None,
        placement=configs[0].placement,
        size=size,
        activation=configs[0].activation,
        dropout=max(config.dropout for config in configs),
        size_pattern={site: value for site, value in sizes.items() if value != size},
    )
    return Body("the merged adapter", config, tensors)
