"""Attention of a row over keys of tasks: how much of each task's adapter it gets."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

PARTS = ("down.weight", "up.weight", "norm.weight", "norm.bias")
"""The weights of the query network."""


class TaskAttention(nn.Module):
    """a(e) = softmax(K q(e) / (T √d)), q(e) = LayerNorm(SiLU(W₂ W₁ e)); K holds a key for each task.

    The keys of earlier tasks stay, the newest may learn, and the query network learns on.

    Args:
        network: Weights of the query network by `PARTS`; W₁ [hidden, d], W₂ [d, hidden].
        keys: K [tasks, d].
        temperature: T.
        learns: Whether the last key learns.
    """

    def __init__(self, network: Mapping[str, Tensor], keys: Tensor, temperature: float, *, learns: bool) -> None:
        super().__init__()
        hidden, width = network["down.weight"].shape
        self.temperature = temperature
        self.down = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.load_state_dict(dict(network), strict=False)
        self.keys: Tensor
        self.register_buffer("keys", keys[:-1].clone() if learns else keys.clone())
        self.key = nn.Parameter(keys[-1:].clone()) if learns else None

    def forward(self, features: Tensor) -> Tensor:
        """The logarithms of the weights, [rows, tasks].

        Args:
            features: e, [rows, d].
        """
        query = self.norm(nn.functional.silu(self.up(self.down(features))))
        keys = self.keys if self.key is None else torch.cat([self.keys, self.key])
        scores = query @ keys.T / (self.temperature * math.sqrt(features.shape[1]))
        weights: Tensor = scores.log_softmax(-1)
        return weights

    def weigh(self, features: Tensor) -> Tensor:
        """The weights, [rows, tasks]; they sum to 1."""
        weights: Tensor = self(features.to(self.keys.device)).exp()
        return weights

    def network(self) -> dict[str, Tensor]:
        """The weights of the query network, by `PARTS`."""
        state = self.state_dict()
        return {name: state[name].detach().cpu().clone() for name in PARTS}


def fresh_network(width: int, hidden: int, seed: int) -> dict[str, Tensor]:
    """A query network as `nn.Linear` and `nn.LayerNorm` begin."""
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.empty(hidden, width), torch.empty(width, hidden)
    for weight in (down, up):
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    return dict(zip(PARTS, (down, up, torch.ones(width), torch.zeros(width)), strict=True))


def fresh_key(width: int, seed: int) -> Tensor:
    """[1, width], each number from −1 to 1."""
    return torch.rand(1, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
