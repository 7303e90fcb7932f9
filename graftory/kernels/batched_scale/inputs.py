"""What `batched_scale` takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The inputs, positions explicit.

    Attributes:
        x: [N, T, D].
        vectors: [K, D].
        adapter: index [N]; -1 for none.
    """

    x: Tensor
    vectors: Tensor
    adapter: Tensor
