"""Every row scaled by its own adapter's vector in one call."""

from __future__ import annotations

from torch import Tensor

from graftory.kernels.backend import Backend, resolved
from graftory.kernels.batched_scale.inputs import Inputs
from graftory.kernels.batched_scale.op import apply
from graftory.kernels.shapes import as_rows, check, check_shape

__all__ = ["batched_scale"]


def batched_scale(x: Tensor, vectors: Tensor, index: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Each row scaled by its own vector: y_i = x_i ⊙ l_k with k = index_i; a row without an adapter stays as it is.

    Source: (IA)³, Liu et al. 2022, arXiv:2205.05638, section 3.3, and the magnitudes of DoRA, Liu et al. 2024,
    arXiv:2402.09353, equation 5, with l = m / ‖W + s B A‖. Run to run the bits are the same, and an adapter's numbers,
    even NaN, reach no row that does not use it.

    Args:
        x: Input rows, [N, ..., D]; all positions of a row use the same adapter.
        vectors: l, [K, D].
        index: Adapter of each row, [N], int64; -1 means none: the row, and its gradient, pass bit for bit.
        backend: `torch` (anywhere), `triton` (a GPU), or `auto`: the latter where it runs.

    Returns:
        The scaled rows, [N, ..., D], in the dtype of `x`, rounded to it once. Differentiable in `x` and `vectors`.

    Raises:
        ValueError: If the shapes disagree, or `triton` is asked for where it cannot run.
    """
    check(vectors.dim() == 2 and x.dim() >= 2, "vectors and x: wanted two dimensions, and two at least")
    check_shape("x", x, (*x.shape[:-1], vectors.shape[1]))
    check_shape("index", index, (x.shape[0],))
    rows, shape = as_rows(x)
    return apply(Inputs(rows, vectors, index), resolved(backend, rows, vectors)).reshape(shape)
