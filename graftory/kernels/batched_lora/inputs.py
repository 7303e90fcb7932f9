"""What `batched_lora` takes, and the gradients that it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from graftory.kernels.inlet import Product

Leave = Callable[[Product], Tensor | None]
"""What becomes of the gradient of x: made, or left for somebody else to multiply out."""


class Inputs(NamedTuple):
    """The inputs, rows and places explicit.

    Attributes:
        x: [N, T, D_in].
        a: [K, R, D_in].
        b: [K, D_out, R].
        scale: [K].
        adapter: index [N, M]; -1 for none.
        weight: [N, M], or None for 1.
        ranks: [K], or None for R.
    """

    x: Tensor
    a: Tensor
    b: Tensor
    scale: Tensor
    adapter: Tensor
    weight: Tensor | None = None
    ranks: Tensor | None = None


class Needed(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    a: bool
    b: bool
    weight: bool


class Gradients(NamedTuple):
    """Of x, a, b and the weights; None where not asked for."""

    x: Tensor | None
    a: Tensor | None
    b: Tensor | None
    weight: Tensor | None
