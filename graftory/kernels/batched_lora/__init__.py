"""Every row's own LoRA update in one call."""

from __future__ import annotations

from torch import Tensor

from graftory.kernels.batched_lora.inputs import Inputs
from graftory.kernels.batched_lora.op import Backend, apply, resolved
from graftory.kernels.shapes import as_rows, check

__all__ = ["Backend", "batched_lora"]


def batched_lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    index: Tensor,
    weight: Tensor | None = None,
    *,
    ranks: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Each row's own LoRA update: y_i = Σ_m w_im s_k B_k A_k x_i with k = index_im.

    Source: Punica, arXiv:2310.18547, section 4; here with mixtures, and with a backward. Run to run the bits are the
    same, and an adapter's numbers, even NaN, reach no row that does not use it.

    Args:
        x: Input rows, [N, ..., D_in]; all positions of a row use the same adapters.
        a: Down projections, [K, R, D_in]; lower ranks are padded with zeros.
        b: Up projections, [K, D_out, R].
        scale: The factor s of each adapter, [K].
        index: Adapter of each row, [N], or adapters, [N, M], int64; -1 means none, and a row without one gets zeros.
        weight: Weight of each of them, of index's shape; 1 if not given. Differentiable, as x, a and b are.
        ranks: True rank of each adapter, [K]; R if not given. It saves work on a GPU.
        backend: `torch` (gather and batched products, anywhere), `triton` (a GPU), or `auto`: the latter where it runs.

    Returns:
        The update, [N, ..., D_out], in the dtype of `a`; on a GPU summed in fp32.

    Raises:
        ValueError: If the shapes disagree, or `triton` is asked for where it cannot run.
    """
    check(a.dim() == 3 and b.dim() == 3, f"a and b: got {a.dim()} and {b.dim()} dimensions, wanted 3 and 3")
    check(a.shape[::2] == (b.shape[0], x.shape[-1]), f"a {tuple(a.shape)} fits neither x {tuple(x.shape)} nor b")
    check(a.shape[1] == b.shape[2], f"ranks differ: a has {a.shape[1]}, b has {b.shape[2]}")
    check(scale.shape == a.shape[:1], f"scale: got {tuple(scale.shape)}, wanted ({a.shape[0]},)")
    check(index.shape[:1] == x.shape[:1], f"index: got {tuple(index.shape)}, wanted ({x.shape[0]},)")
    check(index.dim() in (1, 2), f"index: got {index.dim()} dimensions, wanted [rows] or [rows, places]")
    check(weight is None or weight.shape == index.shape, f"weight: wanted the shape of index, {tuple(index.shape)}")
    check(ranks is None or ranks.shape == scale.shape, f"ranks: wanted ({a.shape[0]},)")
    rows, shape = as_rows(x.to(a.dtype))
    places = index if index.dim() == 2 else index[:, None]
    weights = weight if weight is None or weight.dim() == 2 else weight[:, None]
    inputs = Inputs(rows, a, b, scale, places, weights, ranks)
    return apply(inputs, resolved(backend, rows, a.shape[1])).reshape(*shape[:-1], b.shape[1])
