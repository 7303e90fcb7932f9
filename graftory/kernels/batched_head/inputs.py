"""What `batched_head` takes, and the gradients that it gives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The inputs, positions explicit.

    Attributes:
        x: [N, T, D].
        weight: [K, O, D].
        bias: [K, O], or None.
        head: index [N]; -1 for none.
        sizes: [K].
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    head: Tensor
    sizes: Tensor


class Needed(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Of x, the weights and the biases; None where not asked for."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
