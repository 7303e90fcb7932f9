"""Every row's own LoRA update in one call."""

from __future__ import annotations

from torch import Tensor

from graftory.kernels.backend import Backend, resolved, working_dtype
from graftory.kernels.batched_lora.inputs import Inputs
from graftory.kernels.batched_lora.op import MAX_RANK, apply
from graftory.kernels.routing import Routing, routing_of
from graftory.kernels.shapes import as_rows, check, check_shape

__all__ = ["Backend", "batched_lora"]


def batched_lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    index: Tensor | Routing,
    weight: Tensor | None = None,
    *,
    ranks: Tensor | None = None,
    onto: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Each row's own LoRA update: y_i = Σ_m w_im s_k B_k A_k x_i with k = index_im.

    Beside a layer, `y = batched_lora(x, ..., onto=layer(x))` with an x that has come through `inlet` makes no tensor of
    y's or x's size that the layer alone would not make.

    Source: Punica, arXiv:2310.18547, section 4; here with mixtures, and with a backward. Run to run the bits are the
    same, and an adapter's numbers, even NaN, reach no row that does not use it.

    Args:
        x: Input rows, [N, ..., D_in]; all positions of a row use the same adapters.
        a: Down projections, [K, R, D_in]; lower ranks are padded with zeros.
        b: Up projections, [K, D_out, R].
        scale: The factor s of each adapter, [K].
        index: Adapter of each row, [N], or adapters, [N, M], int64; -1 means none, and a row without one gets zeros. Or
            a `Routing` of that, which all layers of a forward share.
        weight: Weight of each of them, of index's shape; 1 if not given. Differentiable, as x, a and b are.
        ranks: True rank of each adapter, [K]; R if not given. It saves work on a GPU.
        onto: What the update is added to, [N, ..., D_out]; its memory is used, so only the result is to be read then.
        backend: `torch` (gather and batched products, anywhere), `triton` (a GPU), or `auto`: the latter where it runs.

    Returns:
        The update, [N, ..., D_out], in the dtype of `a` (under autocast, in autocast's); on a GPU summed in fp32. With
        `onto` the sum, in the dtype of that.

    Raises:
        ValueError: If the shapes disagree, or `triton` is asked for where it cannot run.
    """
    check(a.dim() == 3 and b.dim() == 3, "a and b: wanted three dimensions each")
    k, rank, width = a.shape
    if b.shape[::2] != (k, rank) or x.shape[-1] != width:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} do not fit each other and x {tuple(x.shape)}")
    routing = routing_of(index, x.shape[0])
    check_shape("scale", scale, (k,))
    check_shape("weight", weight, tuple(routing.index.shape))
    check_shape("ranks", ranks, (k,))
    dtype = working_dtype(a)
    rows, shape = as_rows(x)
    if a.dtype != dtype or b.dtype != dtype:  # to ask costs less than `to` does where there is nothing to do
        a, b = a.to(dtype), b.to(dtype)
    weights = weight if weight is None or weight.dim() == 2 else weight[:, None]
    plain = routing.plain(rows, k)
    chosen = resolved(backend, rows, a, fits=rank <= MAX_RANK, wanted=f"rank {MAX_RANK} at most", plain=plain)
    if chosen == "torch" and rows.dtype != dtype:  # a kernel reads x as it is
        rows = rows.to(dtype)
    inputs = Inputs(rows, a, b, scale, routing.places, weights, ranks)
    wanted = (*shape[:-1], b.shape[1])
    check_shape("onto", onto, wanted)
    return apply(inputs, routing, chosen, None if onto is None else as_rows(onto)[0]).reshape(wanted)
