"""Every row's own LoRA update in one call."""

from __future__ import annotations

from torch import Tensor

from graftory.kernels.batched_lora.reference import reference
from graftory.kernels.shapes import as_rows, check


def batched_lora(x: Tensor, a: Tensor, b: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """Each row's own LoRA update: y_i = s_k B_k A_k x_i with k = index_i.

    Source: Punica, arXiv:2310.18547, section 4.

    Args:
        x: Input rows, [N, ..., D_in]; all positions of a row use the same adapter.
        a: Down projections, [K, R, D_in]; lower ranks are padded with zeros.
        b: Up projections, [K, D_out, R].
        scale: The factor s of each adapter, [K].
        index: Adapter of each row, [N], int64; -1 means no adapter and gives exact zeros.

    Returns:
        The update, [N, ..., D_out], in the dtype of `a`.

    Raises:
        ValueError: If the shapes disagree.
    """
    check(a.dim() == 3 and b.dim() == 3, f"a and b: got {a.dim()} and {b.dim()} dimensions, wanted 3 and 3")
    check(a.shape[::2] == (b.shape[0], x.shape[-1]), f"a {tuple(a.shape)} fits neither x {tuple(x.shape)} nor b")
    check(a.shape[1] == b.shape[2], f"ranks differ: a has {a.shape[1]}, b has {b.shape[2]}")
    check(scale.shape == a.shape[:1], f"scale: got {tuple(scale.shape)}, wanted ({a.shape[0]},)")
    check(index.shape == x.shape[:1], f"index: got {tuple(index.shape)}, wanted ({x.shape[0]},)")
    rows, shape = as_rows(x.to(a.dtype))
    return reference(rows, a, b, scale, index).reshape(*shape[:-1], b.shape[1])
