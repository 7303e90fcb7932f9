"""Every row's own bottleneck adapter in one call."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from graftory.kernels.batched_bottleneck.reference import reference
from graftory.kernels.shapes import as_rows, check


def batched_bottleneck(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: Tensor,
    index: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Each row's own bottleneck: y_i = s_k (U_k act(D_k x_i + c_k) + e_k) with k = index_i.

    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.

    Args:
        x: Input rows, [N, ..., D]; all positions of a row use the same adapter.
        down: D, [K, R, D]; narrower adapters are padded with zeros.
        down_bias: c, [K, R].
        up: U, [K, D, R].
        up_bias: e, [K, D].
        scale: s, [K].
        index: Adapter of each row, [N], int64; -1 means no adapter and gives exact zeros.
        activation: Element-wise, shared by all K adapters.

    Returns:
        The adapters' outputs, without residual, [N, ..., D], in the dtype of `down`.

    Raises:
        ValueError: If the shapes disagree.
    """
    k, hidden, width = down.shape
    check(x.shape[-1] == width, f"x {tuple(x.shape)} does not fit down {tuple(down.shape)}")
    check(up.shape == (k, width, hidden), f"up: got {tuple(up.shape)}, wanted {(k, width, hidden)}")
    check(down_bias.shape == (k, hidden), f"down_bias: got {tuple(down_bias.shape)}, wanted {(k, hidden)}")
    check(up_bias.shape == (k, width), f"up_bias: got {tuple(up_bias.shape)}, wanted {(k, width)}")
    check(scale.shape == (k,), f"scale: got {tuple(scale.shape)}, wanted ({k},)")
    check(index.shape == x.shape[:1], f"index: got {tuple(index.shape)}, wanted ({x.shape[0]},)")
    rows, shape = as_rows(x.to(down.dtype))
    return reference(rows, down, down_bias, up, up_bias, scale, index, activation).reshape(shape)
