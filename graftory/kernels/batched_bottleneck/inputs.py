"""What `batched_bottleneck` takes, and the gradients that it gives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The inputs, rows and places explicit; beside them goes the activation's name.

    Attributes:
        x: [N, T, D].
        down: [K, R, D].
        down_bias: [K, R].
        up: [K, D, R].
        up_bias: [K, D].
        scale: [K].
        adapter: index [N, M]; -1 for none.
        weight: [N, M], or None for 1.
        keep: Multipliers of the hidden units, [N, T, M R], or None for 1.
        sizes: [K], or None for R.
    """

    x: Tensor
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    scale: Tensor
    adapter: Tensor
    weight: Tensor | None = None
    keep: Tensor | None = None
    sizes: Tensor | None = None


class Needed(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    down: bool
    down_bias: bool
    up: bool
    up_bias: bool
    weight: bool


class Gradients(NamedTuple):
    """Of x, the matrices, the biases and the weights; None where not asked for."""

    x: Tensor | None
    down: Tensor | None
    down_bias: Tensor | None
    up: Tensor | None
    up_bias: Tensor | None
    weight: Tensor | None
