"""Some tokens of each row: layers that work token by token run on these alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """K tokens of each row.

    Attributes:
        index: Their places, [rows, K], each at most once.
        weights: What their updates count, [rows, K]; 0 for those that fill up a row with fewer.
        tokens: How many tokens a row has.
        narrow: Whether layers run on the chosen tokens alone; else on all, of which the others count 0.
    """

    index: Tensor
    weights: Tensor
    tokens: int
    narrow: bool

    def take(self, x: Tensor) -> Tensor:
        """The chosen of [rows, tokens, d], [rows, K, d]."""
        return x.gather(1, self.index[..., None].expand(-1, -1, x.shape[-1]))

    def spread(self, chosen: Tensor) -> Tensor:
        """[rows, K, d] at their places in [rows, tokens, d], with 0 elsewhere."""
        whole = chosen.new_zeros(len(chosen), self.tokens, chosen.shape[-1])
        return whole.scatter(1, self.index[..., None].expand_as(chosen), chosen)

    def weighted(self, chosen: Tensor) -> Tensor:
        """[rows, K, d] times their weights."""
        return chosen * self.weights[..., None].to(chosen.dtype)

    def gates(self) -> Tensor:
        """The weights of all tokens, [rows, tokens]; 0 where one is not chosen."""
        return self.weights.new_zeros(len(self.weights), self.tokens).scatter(1, self.index, self.weights)


def best_first(scores: Tensor, most: int) -> Tensor:
    """The places of the largest numbers of each row, [rows, most]; of equal ones the first counts as larger."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    return order[:, :most]
