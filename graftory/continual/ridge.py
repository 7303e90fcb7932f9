"""Ridge regression from sums: what a linear head on frozen features needs of rows that are gone.

With rows h (features, [M]) and one-hot labels y ([K]), all of it is G = Σ h hᵀ and C = Σ h yᵀ. Sums do not care for the
order of rows or tasks, so a head made from them is the one that all rows at once would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from graftory.errors import ConfigError, ShapeError

STRENGTHS = tuple(10.0**power for power in range(-8, 5))
"""Among which λ is looked for, as shares of the mean of G's diagonal."""
_CHUNK = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums over rows, fp64."""

    gram: Tensor
    """G = Σ h hᵀ, [M, M]."""
    sums: Tensor
    """C = Σ h yᵀ, [M, K]: a column for each class."""
    rows: int = 0

    @classmethod
    def none(cls, width: int) -> Moments:
        """Of no rows and no classes."""
        return cls(torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, 0, dtype=torch.float64))

    def add(self, features: Tensor, classes: Tensor, count: int) -> Moments:
        """These and more rows.

        Args:
            features: [N, M].
            classes: The class of each row, [N] int64.
            count: How many classes there are now; new ones stand behind the old.

        Raises:
            ShapeError: If a row is wider or narrower, or of a class beyond the count.
        """
        width, known = self.sums.shape
        if features.dim() != 2 or features.shape[1] != width or len(classes) != len(features):
            got = f"{tuple(features.shape)} with {len(classes)} classes"
            raise ShapeError(f"features: got {got}, wanted [rows, {width}] and a class for each row")
        if count < known or bool((classes >= count).any()):
            raise ShapeError(f"classes: got {int(classes.max()) + 1}, {known} of them known, wanted at most {count}")
        gram, sums = self.gram.clone(), functional.pad(self.sums, (0, count - known))
        for start in range(0, len(features), _CHUNK):
            part, own = features[start : start + _CHUNK].double(), classes[start : start + _CHUNK]
            gram.addmm_(part.T, part)
            sums.index_add_(1, own, part.T)
        return Moments(gram, sums, self.rows + len(features))

    def __add__(self, other: Moments) -> Moments:
        classes = max(self.sums.shape[1], other.sums.shape[1])
        mine, theirs = (functional.pad(each.sums, (0, classes - each.sums.shape[1])) for each in (self, other))
        return Moments(self.gram + other.gram, mine + theirs, self.rows + other.rows)


def solve(moments: Moments, strength: float) -> Tensor:
    """W = (G + λ I)⁻¹ C, λ = strength · tr(G)/M: the least Σ ‖Wᵀh − y‖² + λ ‖W‖², [M, K].

    Raises:
        ConfigError: If there are no rows.
    """
    if not moments.rows:
        raise ConfigError("the ridge head has seen no rows; add a task first")
    shrunk = moments.gram.clone()
    shrunk.diagonal().add_(_absolute(moments, strength))
    return torch.cholesky_solve(moments.sums, torch.linalg.cholesky(shrunk))


def held_out_errors(fitted: Moments, held: Moments, strengths: Sequence[float] = STRENGTHS) -> Tensor:
    """Mean squared error on held-out rows of the head that the other rows give, for every λ, from the sums alone.

    Σ ‖Wᵀh − y‖² = tr(Wᵀ G_held W) − 2 tr(Wᵀ C_held) + n_held. One eigendecomposition G = Q diag(e) Qᵀ serves every λ:
    W = Q diag(1/(e + λ)) Qᵀ C.

    Returns:
        [strengths].
    """
    values, vectors = torch.linalg.eigh(fitted.gram)
    turned = vectors.T @ held.gram @ vectors
    seen, asked = vectors.T @ fitted.sums, vectors.T @ held.sums
    errors = []
    for strength in strengths:
        weights = seen / (values.clamp(min=0) + _absolute(fitted, strength))[:, None]
        quadratic = (weights * (turned @ weights)).sum()
        errors.append((quadratic - 2 * (weights * asked).sum() + held.rows) / max(1, held.rows))
    return torch.stack(errors)


def choose_strength(fitted: Moments, held: Moments, strengths: Sequence[float] = STRENGTHS) -> float:
    """The λ with the least held-out error, as a share of the mean of G's diagonal; the larger of equals."""
    errors = held_out_errors(fitted, held, strengths)
    best = float(errors.min())
    return max(s for s, error in zip(strengths, errors.tolist(), strict=True) if error <= best * (1 + 1e-12))


def random_projection(width: int, size: int, seed: int) -> Tensor:
    """P with standard normal entries, [width, size] fp32; the same again from its seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, size, generator=generator)


def projected(features: Tensor, projection: Tensor) -> Tensor:
    """h = ReLU(f P), [N, M]."""
    return functional.relu(features.to(projection.dtype) @ projection)


def _absolute(moments: Moments, strength: float) -> float:
    return strength * float(moments.gram.diagonal().mean())
