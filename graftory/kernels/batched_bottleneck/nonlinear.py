"""The activations and their derivatives in Triton, by name; from `exp` and `erf` alone, in fp32.

NaN stays NaN, as in torch: where it is compared with anything, the answer is no.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def sigmoid(z: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(−z)), of an exponential that does not overflow."""
    small = tl.exp(-tl.abs(z))
    return tl.where(z < 0, small, 1.0) / (1.0 + small)


@triton.jit  # type: ignore[untyped-decorator]
def tanh(z: tl.tensor) -> tl.tensor:
    """(1 − t) / (1 + t) with t = exp(−2 |z|); near 0, where that cancels, the series."""
    square = z * z
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    small = tl.exp(-2.0 * tl.abs(z))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(z) < 0.25, z * series, tl.where(z < 0, -size, size))


@triton.jit  # type: ignore[untyped-decorator]
def activated(z: tl.tensor, name: tl.constexpr) -> tl.tensor:
    """act(z); z itself without a name."""
    result = z
    if name == "relu":
        result = tl.where(z < 0, 0.0, z)
    elif name == "gelu":
        result = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif name == "gelu_new":  # ½ (1 + tanh(u)) is the sigmoid of 2 u
        result = z * sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif name == "silu":
        result = z * sigmoid(z)
    elif name == "tanh":
        result = tanh(z)
    return result


@triton.jit  # type: ignore[untyped-decorator]
def derived(z: tl.tensor, name: tl.constexpr) -> tl.tensor:
    """act'(z)."""
    result = z
    if name == "relu":
        result = tl.where(z <= 0, 0.0, 1.0)
    elif name == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        result = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif name == "gelu_new":
        gate = sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        result = gate + z * gate * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif name == "silu":
        gate = sigmoid(z)
        result = gate * (1.0 + z * (1.0 - gate))
    elif name == "tanh":
        small = tl.exp(-2.0 * tl.abs(z))
        result = 4.0 * small / ((1.0 + small) * (1.0 + small))
    return result
