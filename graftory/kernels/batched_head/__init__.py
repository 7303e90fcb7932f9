"""Every row's own classification head, of its own size, in one call."""

from __future__ import annotations

from torch import Tensor

from graftory.kernels.backend import Backend, resolved, working_dtype
from graftory.kernels.batched_head.inputs import Inputs
from graftory.kernels.batched_head.op import apply
from graftory.kernels.shapes import as_rows, check, check_shape

__all__ = ["batched_head"]


def batched_head(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    sizes: Tensor,
    *,
    fill: float = float("-inf"),
    backend: Backend = "auto",
) -> Tensor:
    """Each row's own linear head: logits_i = W_k x_i + b_k with k = index_i, padded behind that head's own size.

    Run to run the bits are the same, and a head's numbers, even NaN, reach no row that does not use it. What lies
    behind a head's size in `weight` and `bias` is never used, and gradients of the padding are ignored, whatever they
    hold: a softmax over rows of fills alone gives NaN, and nothing comes of it.

    Args:
        x: Input rows, [N, ..., D]; all positions of a row use the same head.
        weight: W, [K, O, D].
        bias: b, [K, O], or None.
        index: Head of each row, [N], int64; -1 means none, and all of the row is `fill`.
        sizes: Outputs of each head, [K], int64, O at most.
        fill: What padding holds; with -inf, a softmax gives it no probability.
        backend: `torch` (gather and batched products, anywhere), `triton` (a GPU), or `auto`: the latter where it runs.

    Returns:
        The logits, [N, ..., O], in the dtype of `weight` (under autocast, in autocast's); on a GPU summed in fp32.
        Differentiable in `x`, `weight` and `bias`.

    Raises:
        ValueError: If the shapes disagree, or `triton` is asked for where it cannot run.
    """
    check(weight.dim() == 3 and x.dim() >= 2, "weight and x: wanted three dimensions, and two at least")
    k, outputs, width = weight.shape
    check_shape("x", x, (*x.shape[:-1], width))
    check_shape("bias", bias, (k, outputs))
    check_shape("index", index, (x.shape[0],))
    check_shape("sizes", sizes, (k,))
    dtype = working_dtype(weight)
    rows, shape = as_rows(x.to(dtype))
    inputs = Inputs(rows, weight.to(dtype), None if bias is None else bias.to(dtype), index, sizes)
    return apply(inputs, float(fill), resolved(backend, rows)).reshape(*shape[:-1], outputs)
