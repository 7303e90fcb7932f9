"""Bringing the hidden units of two adapters into correspondence by optimal transport (POT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from graftory.errors import MergeError

Transport = Literal["emd", "sinkhorn"]


@dataclass(frozen=True, slots=True)
class Alignment:
    """What carries hidden units of a source to those of an anchor.

    Attributes:
        down: [r_source, r_anchor], columns sum to 1: each anchor unit reads the mean of the units carried to it.
        up: [r_source, r_anchor], rows sum to 1: what a unit writes is shared among the units it is carried to.
    """

    down: Tensor
    up: Tensor


def align(cost: Tensor, transport: Transport, epsilon: float, signs: Tensor | None = None) -> Alignment:
    """Carry units of a source to units of an anchor at the least cost, both weighted uniformly.

    T minimises Σ T_ij C_ij with row sums 1/r_source and column sums 1/r_anchor (`ot.emd`), or that less ε times its
    entropy (`ot.sinkhorn` in the log domain, ε relative to the mean cost). Then `down` is T diag(1/β) and `up` is
    diag(1/α) T. With as many units on both sides the two are equal, and with `emd` a permutation. With
    different widths they are not: what units read is averaged, what they write must be kept in sum. So a
    source that has each unit of the anchor k times, each writing a k-th, is carried to the anchor exactly.

    Args:
        cost: [r_source, r_anchor].
        transport: How.
        epsilon: For `sinkhorn`.
        signs: [r_source, r_anchor] of ±1: how a pair of units that are free in sign agrees.

    Raises:
        MergeError: If a cost is not finite, or the transport does not converge.
    """
    import ot

    if not bool(torch.isfinite(cost).all()):
        raise MergeError("mera: hidden units with NaN or infinite weights cannot be aligned; train the adapter again")
    rows, columns = cost.shape
    alpha, beta = np.full(rows, 1 / rows), np.full(columns, 1 / columns)
    matrix: Any = cost.double().numpy()
    if transport == "emd":
        plan, log = ot.emd(alpha, beta, matrix, numItermax=1_000_000, log=True)
        trouble = log["warning"]
    else:
        scale = float(matrix.mean()) or 1.0
        plan, log = ot.sinkhorn(
            alpha, beta, matrix / scale, epsilon, method="sinkhorn_log", numItermax=20_000, log=True, warn=False
        )
        trouble = None if np.abs(plan.sum(1) - alpha).max() < 1e-4 / rows else "its marginals are off"
    if trouble:
        raise MergeError(f"mera: {transport} did not converge ({trouble}); use emd, or sinkhorn with a larger epsilon")
    carried = torch.from_numpy(plan) * (1 if signs is None else signs.double())
    return Alignment(carried * columns, carried * rows)


def distances(left: Tensor, right: Tensor) -> Tensor:
    """Squared distances of all rows, [rows of left, rows of right], in float64."""
    return torch.cdist(left.double(), right.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
