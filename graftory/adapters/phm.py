"""Parameterised hypercomplex multiplication: a matrix as a sum of Kronecker products (Zhang et al. 2021,
arXiv:2102.08597).

W = Σ_i A_i ⊗ (s_i t_i), i = 1..n, with A [n, n, n], s [n, out/n, k], t [n, k, in/n]: W is [out, in]. Compacter makes
the two matrices of its bottlenecks so (arXiv:2106.04647, eq. 3 to 5); A is the same at every site and for both of
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from graftory.adapters.expanded import DOWN, Expanded
from graftory.config import CompacterConfig

DOWN_LEFT, DOWN_RIGHT, DOWN_BIAS, UP_LEFT, UP_RIGHT, UP_BIAS, RULE = CompacterConfig.parts


def product(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σ_i A_i ⊗ (s_i t_i), [out, in]."""
    whole = torch.einsum("iab,ipk,ikq->apbq", rule, left, right)
    return whole.reshape(whole.shape[0] * whole.shape[1], -1)


def phm_shapes(config: CompacterConfig, path: str, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors at one site, by part; the first site has A as well."""
    n, k, size = config.division, config.factor_rank, config.size_of(path)
    shapes: dict[str, tuple[int, ...]] = {
        DOWN_LEFT: (n, size // n, k),
        DOWN_RIGHT: (n, k, width // n),
        DOWN_BIAS: (size,),
        UP_LEFT: (n, width // n, k),
        UP_RIGHT: (n, k, size // n),
        UP_BIAS: (width,),
    }
    return {**shapes, RULE: (n, n, n)} if path == config.targets[0] else shapes


class Factored(Expanded):
    """A compacter's site: D and U are products, the biases its own."""

    shares: ClassVar = (RULE,)

    @staticmethod
    def shapes(config: Any, path: str, width: int) -> Mapping[str, tuple[int, ...]]:
        """See `Expanded.shapes`."""
        return phm_shapes(config, path, width)

    def make(self, part: str) -> Tensor:
        """See `Expanded.make`."""
        left, right = (DOWN_LEFT, DOWN_RIGHT) if part == DOWN else (UP_LEFT, UP_RIGHT)
        return product(self.shared[RULE], self.own[left], self.own[right])
