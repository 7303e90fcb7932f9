"""The non-linearities of bottlenecks by name, each with its derivative; the same numbers as in transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Activation = Literal["relu", "gelu", "gelu_new", "silu", "tanh"]


class Nonlinear(NamedTuple):
    """An element-wise function and its chain rule.

    Attributes:
        function: act(z).
        chain: grad ⊙ act'(z), given grad and z.
    """

    function: Callable[[Tensor], Tensor]
    chain: Callable[[Tensor, Tensor], Tensor]


def _gelu_new(z: Tensor) -> Tensor:
    """½ z (1 + tanh(√(2/π) (z + 0.044715 z³))), term by term as transformers has it."""
    return 0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0))))


_aten = torch.ops.aten
# torch's own chain rules: one pass each, where a formula in Python takes several
ACTIVATIONS: Mapping[str, Nonlinear] = {
    "relu": Nonlinear(torch.relu, lambda grad, z: _aten.threshold_backward(grad, z, 0)),
    "gelu": Nonlinear(functional.gelu, _aten.gelu_backward),
    "gelu_new": Nonlinear(_gelu_new, lambda grad, z: _aten.gelu_backward(grad, z, approximate="tanh")),
    "silu": Nonlinear(functional.silu, _aten.silu_backward),
    "tanh": Nonlinear(torch.tanh, lambda grad, z: _aten.tanh_backward(grad, torch.tanh(z))),
}
