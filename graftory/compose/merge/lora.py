"""Sums of LoRA updates, exactly, as one LoRA: factors side by side, then optionally the best rank r."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from graftory.compose.merge.base import Body, check_keys, most_common, union_of_targets
from graftory.config import LoraConfig
from graftory.errors import MergeError

Factors = tuple[Tensor, Tensor]
"""A LoRA update of scale 1 as (B [d_out, r], A [r, d_in])."""


def factors_of(body: Body) -> dict[str, Factors]:
    """Each site's update in fp32 with its scale folded into B, so that Δ = B A.

    Raises:
        MergeError: If a tensor is missing or unexplained.
    """
    config = cast(LoraConfig, body.config)
    check_keys(body, [f"{path}.lora_{side}.weight" for path in config.targets for side in "AB"])
    return {
        path: (
            body.tensors[f"{path}.lora_B.weight"].float() * config.scale_of(path),
            body.tensors[f"{path}.lora_A.weight"].float(),
        )
        for path in config.targets
    }


def weighted_sum(bodies: Sequence[Body], weights: Sequence[float]) -> dict[str, Factors]:
    """Σ w_t Δ_t of every site as factors of rank Σ r_t: no cross terms, nothing rounded away.

    Raises:
        MergeError: If two adapters disagree on a module's shape.
    """
    parts = [(factors_of(body), weight) for body, weight in zip(bodies, weights, strict=True)]
    merged: dict[str, Factors] = {}
    for path in union_of_targets(bodies):
        here = [(factors[path][0] * weight, factors[path][1]) for factors, weight in parts if path in factors]
        shapes = {(b.shape[0], a.shape[1]) for b, a in here}
        if len(shapes) > 1:
            raise MergeError(f"{path}: updates of different shapes {sorted(shapes)}; are they of one base model?")
        merged[path] = (torch.cat([b for b, _ in here], dim=1), torch.cat([a for _, a in here], dim=0))
    return merged


def truncate(b: Tensor, a: Tensor, rank: int) -> Factors:
    """The best rank-r approximation of B A, from the factors alone.

    B = Q_b R_b, Aᵀ = Q_a R_a, R_b R_aᵀ = U S Vᵀ (a core of at most R x R), so the update's leading
    singular triplets are Q_b U, S, Q_a V: cost O(d R²), never a d x d matrix.

    Args:
        b: [d_out, R].
        a: [R, d_in].
        rank: r; nothing is done if R <= r.

    Returns:
        Balanced factors (B √S, √S A), [d_out, r] and [r, d_in].
    """
    if a.shape[0] <= rank:
        return b, a
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    return (q_b @ u[:, :rank] * root).float(), (root[:, None] * (vh[:rank] @ q_a.T)).float()


def lora_body(factors: Mapping[str, Factors], dropout: float) -> Body:
    """Factors of scale 1 as the body of a LoRA adapter: alpha = rank at every site, patterns where ranks differ."""
    ranks = {path: a.shape[0] for path, (_, a) in factors.items()}
    rank = most_common(list(ranks.values()))
    other = {path: value for path, value in ranks.items() if value != rank}
    config = LoraConfig(
        targets=tuple(factors),
        init_seed=None,
        rank=rank,
        alpha=float(rank),
        dropout=dropout,
        rank_pattern=other,
        alpha_pattern={path: float(value) for path, value in other.items()},
    )
    tensors = {
        f"{path}.lora_{side}.weight": tensor.contiguous()
        for path, (b, a) in factors.items()
        for side, tensor in (("A", a), ("B", b))
    }
    return Body("the merged adapter", config, tensors)
