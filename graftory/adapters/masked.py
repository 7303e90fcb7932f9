"""Binary masks over one bottleneck that all layers share (Zeng et al. 2023, arXiv:2305.17682), and how they are kept.

A site's D and U are m ⊙ D₀ and m' ⊙ U₀, with masks of its own and the prototype D₀, c, U₀, e of all. A mask is
one bit a weight: [⌈n / 8⌉] in uint8, the first weight in the highest bit, what is left of the last byte 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from graftory.adapters.expanded import DOWN, DOWN_BIAS, UP, Expanded
from graftory.config import PropetlConfig

MASK_DOWN, MASK_UP, *PROTOTYPE = PropetlConfig.parts
_PLACES = (7, 6, 5, 4, 3, 2, 1, 0)


def kept_count(share: float, count: int) -> int:
    """How many of so many weights a mask keeps: at least one."""
    return max(1, round(share * count))


def packed(mask: Tensor) -> Tensor:
    """A mask of any shape, 0 or 1, as bytes."""
    flags = mask.flatten() != 0
    flags = functional.pad(flags, (0, -len(flags) % 8)).view(-1, 8).to(torch.uint8)
    return (flags << torch.tensor(_PLACES, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpacked(codes: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask in bytes, as 0 or 1 in uint8."""
    bits = (codes[:, None] >> torch.tensor(_PLACES, dtype=torch.uint8, device=codes.device)) & 1
    return bits.flatten()[: torch.Size(shape).numel()].view(*shape)


def masked_shapes(config: PropetlConfig, path: str, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors at one site, by part; the first site has the prototype as well."""
    size = config.size
    masks: dict[str, tuple[int, ...]] = dict.fromkeys((MASK_DOWN, MASK_UP), (-(-size * width // 8),))
    shapes = ((size, width), (size,), (width, size), (width,))
    return masks | (dict(zip(PROTOTYPE, shapes, strict=True)) if path == config.targets[0] else {})


class Masked(Expanded):
    """A site of ProPETL. While it learns, what stands in for a mask is one of floats, with gradients to its scores."""

    shares: ClassVar = tuple(PROTOTYPE)

    @staticmethod
    def shapes(config: Any, path: str, width: int) -> Mapping[str, tuple[int, ...]]:
        """See `Expanded.shapes`."""
        return masked_shapes(config, path, width)

    def make(self, part: str) -> Tensor:
        """See `Expanded.make`."""
        down, down_bias, up, up_bias = (self.shared[name] for name in PROTOTYPE)
        if part in (DOWN, UP):
            whole, mask = (down, self.own[MASK_DOWN]) if part == DOWN else (up, self.own[MASK_UP])
            return whole * (mask if mask.is_floating_point() else unpacked(mask, whole.shape)).view(whole.shape)
        return down_bias if part == DOWN_BIAS else up_bias
