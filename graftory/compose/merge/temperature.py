"""What a classifier's probabilities are once they are as sure as it is right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

BOUNDS = (0.25, 4.0)
"""Of a temperature. A classifier that is right everywhere has none: the colder, the likelier."""


def temperature_of(logits: Tensor, targets: Sequence[int]) -> float:
    """The temperature T at which −Σ_i log softmax(z_i / T)_{y_i} is least, between bounds.

    It has one minimum, as it is convex in 1 / T. Guo et al. 2017, arXiv:1706.04599, section 4.2.

    Args:
        logits: z, [rows, classes].
        targets: y, the class of each row.
    """

    def loss(log_temperature: float) -> float:
        return -float(_log_likelihoods(logits, targets, math.exp(log_temperature)).sum())

    low, high = map(math.log, BOUNDS)
    return math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-4}).x)


def calibrated(logits: Tensor, targets: Sequence[int]) -> tuple[float, ...]:
    """The probability of the right class of each row, at the temperature of these rows."""
    return tuple(_log_likelihoods(logits, targets, temperature_of(logits, targets)).exp().tolist())


def _log_likelihoods(logits: Tensor, targets: Sequence[int], temperature: float) -> Tensor:
    """log softmax(z / T)_y, [rows]."""
    scaled = (logits.double() / temperature).log_softmax(1)
    return scaled.gather(1, torch.tensor(targets, device=logits.device)[:, None])[:, 0]
