"""Merges entry by entry: drop entries of each update, then add what is left, or elect a sign and take the mean.

TIES, DARE, DELLA and magnitude pruning differ in these two steps alone; each is a row of `RECIPES`. They are not
linear, so ΔW itself is needed: it is made in blocks of rows, and only the merged matrix is there as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graftory.compose.merge.base import Body, MergeParameters, check_rank, check_scaling
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.dense import Stack, low_rank, stack_of_deltas
from graftory.compose.merge.sites import Site, as_rows, merge_sites
from graftory.compose.merge.sparsify import SPARSIFIERS, Sparsifier, Sparsity
from graftory.compose.merge.spectrum import TOLERANCE
from graftory.config import option


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryParameters(MergeParameters):
    """What all merges entry by entry have."""

    rank: int | None = option("rank of the result; if not given nothing is cut, and it is as wide as the module", None)
    scaling: float = option("factor on the merged update", 1.0)

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_scaling(self.scaling)
        self.sparsity("")

    def sparsity(self, where: str) -> Sparsity:
        """How much is dropped at a module.

        Raises:
            MergeError: If shares are none.
        """
        raise NotImplementedError


Combine = Callable[[Tensor, Tensor], Tensor]


def weighted_sum(block: Tensor, weights: Tensor) -> Tensor:
    """Σ w_t x_t of a block [T, n, columns]."""
    return (weights * block).sum(0)


def elected_mean(block: Tensor, weights: Tensor) -> Tensor:
    """The mean of the entries whose sign is that of Σ w_t x_t (TIES: elect, disjoint merge), 0 where it is 0.

    Σ w_t x_t / Σ |w_t| over those with sign(w_t x_t) = sign(Σ w_t x_t). Entries that were dropped are 0 and have no
    sign, so they count for nothing. With equal weights it is the paper's plain mean. A sum that is rounding beside what
    is added counts as 0: its sign would be that of the noise.
    """
    weighted = weights * block
    elected = weighted.sum(0)
    sign = torch.where(elected.abs() > TOLERANCE * weighted.abs().sum(0), elected.sign(), 0)
    agree = (weighted.sign() == sign) & (weighted != 0)
    mass = (weights.abs() * agree).sum(0)
    return torch.where(mass > 0, (weighted * agree).sum(0) / mass, 0)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is dropped, and how the rest becomes one."""

    sparsifier: Sparsifier
    combine: Combine


Recipes = Literal["linear", "magnitude", "ties", "dare", "dare_ties", "della"]
RECIPES: Mapping[Recipes, Recipe] = {
    "linear": Recipe("all", weighted_sum),
    "magnitude": Recipe("magnitude", weighted_sum),
    "ties": Recipe("magnitude", elected_mean),
    "dare": Recipe("random", weighted_sum),
    "dare_ties": Recipe("random", elected_mean),
    "della": Recipe("rank", elected_mean),
}
"""Every merge entry by entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerParameters(MergeParameters):
    """What methods have that merge entry by entry in other coordinates, where the result is of low rank by itself."""

    rank: int | None = option("rank of the result; if not given nothing is cut", None)
    scaling: float = option("factor on the merged update", 1.0)
    inner: Recipes = option("how entries are merged there", "ties")
    density: float = option("share of the entries that is kept there", 0.2)
    window: float = option("inner della: chances to be kept lie this wide about the density", 0.2)
    seed: int = 0
    """Of what is dropped."""

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_scaling(self.scaling)
        self.sparsity("")

    def sparsity(self, where: str) -> Sparsity:
        """How much is dropped at a module.

        Raises:
            MergeError: If shares are none.
        """
        return Sparsity(self.density, self.window if self.inner == "della" else 0.0, self.seed, where)


def merge_entries(stack: Stack, weights: Sequence[float], recipe: Recipe, sparsity: Sparsity) -> Tensor:
    """Merge matrices entry by entry, a block of rows at a time, [rows, columns]."""
    drop = SPARSIFIERS[recipe.sparsifier](stack, sparsity)
    factors = torch.tensor(weights, dtype=torch.float64)[:, None, None]
    return torch.cat([recipe.combine(drop(block), factors.to(block.dtype)) for block in stack.blocks()])


def merge_by_entry(
    bodies: Sequence[Body], weights: Sequence[float], recipe: Recipe, parameters: EntryParameters
) -> Body:
    """Merge updates entry by entry, and factorise the results. Biases are merged so too, each a row of its own.

    Raises:
        MergeError: If all weights are 0 or shapes disagree.
    """

    def merged(site: Site) -> Delta:
        found = merge_entries(stack_of_deltas(site.deltas), site.weights, recipe, parameters.sparsity(site.path))
        return low_rank(found, parameters.rank).scaled(parameters.scaling)

    return merge_sites(bodies, weights, merged, vectors=as_rows(merged), factored=False)
