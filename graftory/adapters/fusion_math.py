"""Attention over the outputs of several adapters, without ever making those outputs.

AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247, section 3.2): with z_n the output of adapter n for a token,
q = Q u + b and k_n = K z_n, s = softmax over n of q . k_n, o = sum_n s_n V z_n. There is no 1 / sqrt(d). The paper's
code gives K a bias too: it adds the same q . b to every logit, so the softmax cannot see it, and it is left out here.

An adapter's output is z_n = t_n (U_n a_n + e_n), t its scale and a_n its few hidden units. Then, exactly,

    q . k_n          = t_n ((U_n^T m) . a_n + e_n . m)      with m = K^T q
    sum_n s_n V z_n  = V (sum_n s_n t_n U_n a_n + s_n t_n e_n)

so with the hidden units of all adapters side by side, R in all, a token costs 3 R d + 3 d^2 multiplications however
many adapters there are, and no tensor [tokens, adapters, d] exists. Products of weights alone may be taken first:
[U, e]^T K^T Q and V [U, e] cost 3 R d^2 once a batch and save the 3 d^2 of every token. The cheaper order is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Activation = Callable[[Tensor], Tensor] | None


@dataclass(frozen=True, slots=True)
class Source:
    """One adapter at one place: z = scale (up act(down x + down_bias) + up_bias)."""

    down: Tensor
    """[r, d_in]"""
    up: Tensor
    """[d_out, r]"""
    scale: float = 1.0
    down_bias: Tensor | None = None
    """[r]"""
    up_bias: Tensor | None = None
    """[d_out]"""
    activation: Activation = None


@dataclass(frozen=True, slots=True)
class Attention:
    """What learns at one place: Q [d_out, d_in], b [d_out], K and V [d_out, d_out]."""

    query: Tensor
    query_bias: Tensor
    key: Tensor
    value: Tensor


class Sources(nn.Module):
    """Frozen adapters side by side; the order of their hidden units is that of the sources.

    Attributes:
        down: [R, d_in]
        down_bias: [R]
        up: U with scales and, behind it, e with scales, [d_out, R + N]; only [d_out, R] if no adapter has an e.
        owner: 1 where a hidden unit is a source's, [R, N].
    """

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    owner: Tensor

    def __init__(self, sources: Sequence[Source], dtype: torch.dtype) -> None:
        super().__init__()
        ranks = [source.down.shape[0] for source in sources]
        ups = [source.scale * source.up for source in sources]
        biases = [None if source.up_bias is None else source.scale * source.up_bias for source in sources]
        self.has_bias = any(bias is not None for bias in biases)
        if self.has_bias:
            zero = sources[0].up.new_zeros(sources[0].up.shape[0])
            ups += [(zero if bias is None else bias).unsqueeze(1) for bias in biases]
        owner = torch.eye(len(sources)).repeat_interleave(torch.tensor(ranks), dim=0)
        self._keep("down", torch.cat([source.down for source in sources]), dtype)
        self._keep("up", torch.cat([up.to(dtype) for up in ups], dim=1), dtype)
        self._keep("owner", owner, dtype)
        if all(source.down_bias is None for source in sources):
            self.register_buffer("down_bias", None)
        else:
            parts = [
                s.down.new_zeros(r) if s.down_bias is None else s.down_bias for s, r in zip(sources, ranks, strict=True)
            ]
            self._keep("down_bias", torch.cat(parts), dtype)
        self.units = _runs(ranks, [source.activation for source in sources])

    def _keep(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        # frozen, and part of no state dict: the sources have files of their own
        self.register_buffer(name, tensor.detach().to(dtype).clone(), persistent=False)

    @property
    def hidden_size(self) -> int:
        """R, the hidden units of all sources."""
        return self.down.shape[0]

    def activate(self, hidden: Tensor) -> Tensor:
        """The sources' non-linearities on [tokens, R]."""
        if len(self.units) == 1:
            return hidden if self.units[0][1] is None else self.units[0][1](hidden)
        parts = hidden.split([count for count, _ in self.units], dim=-1)
        return torch.cat(
            [part if act is None else act(part) for part, (_, act) in zip(parts, self.units, strict=True)], -1
        )


def _runs(ranks: Sequence[int], activations: Sequence[Activation]) -> list[tuple[int, Activation]]:
    """Neighbours of one activation together: how many hidden units, and which."""
    runs: list[tuple[int, Activation]] = []
    for rank, activation in zip(ranks, activations, strict=True):
        if runs and runs[-1][1] is activation:
            runs[-1] = (runs[-1][0] + rank, activation)
        else:
            runs.append((rank, activation))
    return runs


def fuse(x: Tensor, sources: Sources, attention: Attention, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """The fused update of every token, and the attention.

    Args:
        x: What the sources read, [tokens, d_in].
        sources: The frozen adapters.
        attention: What learns.
        dropout: Rate at which logits are dropped.

    Returns:
        The update [tokens, d_out], and the weight of each source [tokens, N].
    """
    way = _weights_first if sources.hidden_size < x.shape[0] else _tokens_first
    return way(x, sources, attention, dropout)


def _tokens_first(x: Tensor, sources: Sources, attention: Attention, dropout: float) -> tuple[Tensor, Tensor]:
    hidden = sources.activate(functional.linear(x, sources.down, sources.down_bias))
    wanted = functional.linear(x, attention.query, attention.query_bias) @ attention.key @ sources.up
    weights = _softmax(hidden, wanted, sources, dropout)
    return functional.linear(_weighted(hidden, weights, sources) @ sources.up.T, attention.value), weights


def _weights_first(x: Tensor, sources: Sources, attention: Attention, dropout: float) -> tuple[Tensor, Tensor]:
    size = sources.hidden_size
    keys = attention.key @ sources.up  # [d_out, R + N]
    bias = attention.query_bias @ keys
    down_bias = bias.new_zeros(size) if sources.down_bias is None else sources.down_bias
    both = functional.linear(x, torch.cat([sources.down, keys.T @ attention.query]), torch.cat([down_bias, bias]))
    hidden = sources.activate(both[:, :size])
    weights = _softmax(hidden, both[:, size:], sources, dropout)
    return functional.linear(_weighted(hidden, weights, sources), attention.value @ sources.up), weights


def _softmax(hidden: Tensor, wanted: Tensor, sources: Sources, dropout: float) -> Tensor:
    """s [tokens, N] from a [tokens, R] and [U, e]^T m [tokens, R (+ N)]."""
    size = sources.hidden_size
    logits = (hidden * wanted[:, :size]) @ sources.owner
    if sources.has_bias:
        logits = logits + wanted[:, size:]
    if dropout:
        logits = functional.dropout(logits, dropout)
    return logits.softmax(-1)


def _weighted(hidden: Tensor, weights: Tensor, sources: Sources) -> Tensor:
    """The hidden units times their source's weight and, where sources have an e, the weights behind them."""
    scaled = hidden * (weights @ sources.owner.T)
    return torch.cat([scaled, weights], -1) if sources.has_bias else scaled
