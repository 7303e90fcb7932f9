"""`batched_lora_slices` as its formula reads, row by row: what every other path is held against. Slow."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graftory.kernels.batched_lora.reference import reference as one


def reference(
    x: Tensor, a: Tensor, b: Tensor, widths: Sequence[int], scale: Tensor, index: Tensor, weight: Tensor | None
) -> list[Tensor]:
    """See `batched_lora_slices`; here x is [N, T, D_in] and index is [N, M]."""
    parts = zip(a, b.split(list(widths), 1), strict=True)
    return [one(x, down, up, scale, index, weight) for down, up in parts]
