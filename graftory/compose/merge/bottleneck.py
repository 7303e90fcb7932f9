"""Sums of bottleneck outputs, exactly, as one wider bottleneck: hidden units side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from graftory.compose.merge.base import Body, check_keys, most_common, union_of_targets
from graftory.config import BottleneckConfig
from graftory.errors import MergeError

_DOWN, _DOWN_BIAS, _UP, _UP_BIAS = BottleneckConfig.parts


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
        check_keys(body, [f"{site}.{part}" for site in body.config.targets for part in body.config.parts])
    for site in union_of_targets(bodies):
        here = [
            (
                {part: body.tensors[f"{site}.{part}"].float() for part in config.parts},
                body.weight_at.get(site, weight) * config.scale,
            )
            for body, config, weight in zip(bodies, configs, weights, strict=True)
            if site in config.targets
        ]
        widths = {parts[_UP_BIAS].shape[0] for parts, _ in here}
        if len(widths) > 1:
            raise MergeError(f"{site}: adapters of widths {sorted(widths)}; are they of one base model?")
        merged = {
            _DOWN: torch.cat([parts[_DOWN] for parts, _ in here]),
            _DOWN_BIAS: torch.cat([parts[_DOWN_BIAS] for parts, _ in here]),
            _UP: torch.cat([factor * parts[_UP] for parts, factor in here], dim=1),
            _UP_BIAS: torch.stack([factor * parts[_UP_BIAS] for parts, factor in here]).sum(0),
        }
        sizes[site] = merged[_DOWN_BIAS].shape[0]
        tensors |= {f"{site}.{part}": tensor for part, tensor in merged.items()}
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
