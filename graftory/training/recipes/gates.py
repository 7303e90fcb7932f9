"""Hard-concrete gates: random numbers from 0 to 1, often exactly 0 or 1, that learn (Louizos et al. 2018,
arXiv:1712.01312).

With u uniform on (0, 1), s = σ((log u − log(1 − u) + log α) / β) and z = min(1, max(0, γ + s (ζ − γ))), γ < 0, ζ > 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CLOSE = 1e-4
"""How near u comes to 0 and 1, where its logarithms end."""


@dataclass(frozen=True, slots=True)
class HardConcrete:
    """The distribution of gates.

    Attributes:
        temperature: β.
        low: γ.
        high: ζ.
    """

    temperature: float
    low: float
    high: float

    def draw(self, log_alpha: Tensor) -> Tensor:
        """A gate each."""
        return self.at(log_alpha, torch.rand_like(log_alpha))

    def at(self, log_alpha: Tensor, u: Tensor) -> Tensor:
        """The gates for given u, from 0 to 1; differentiable in log α."""
        u = u.clamp(_CLOSE, 1 - _CLOSE)
        return self._cut(((u.log() - torch.log1p(-u) + log_alpha) / self.temperature).sigmoid())

    def usual(self, log_alpha: Tensor) -> Tensor:
        """The gates without chance: min(1, max(0, γ + σ(log α) (ζ − γ))), as in Louizos et al., equation 13."""
        return self._cut(log_alpha.sigmoid())

    def chance(self, log_alpha: Tensor) -> Tensor:
        """P(z > 0) = σ(log α − β log(−γ / ζ))."""
        return (log_alpha - self.temperature * math.log(-self.low / self.high)).sigmoid()

    def _cut(self, s: Tensor) -> Tensor:
        return (s * (self.high - self.low) + self.low).clamp(0, 1)
