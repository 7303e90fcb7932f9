"""Every row's own LoRA updates of several linears with one input, in one call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graftory.kernels.backend import Backend, resolved, working_dtype
from graftory.kernels.batched_lora.inputs import Inputs
from graftory.kernels.batched_lora.op import MAX_RANK
from graftory.kernels.batched_lora_slices.op import apply
from graftory.kernels.routing import Routing, routing_of
from graftory.kernels.shapes import as_rows, check, check_shape

__all__ = ["batched_lora_slices"]


def batched_lora_slices(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    widths: Sequence[int],
    scale: Tensor,
    index: Tensor | Routing,
    weight: Tensor | None = None,
    *,
    ranks: Tensor | None = None,
    backend: Backend = "auto",
) -> list[Tensor]:
    """Each row's own LoRA updates of slices that share an input: y_si = Σ_m w_im s_k B_sk A_sk x_i with k = index_im.

    Query, key and value, or gate and up: on a GPU as many launches as `batched_lora` needs for one of them. What that
    function promises holds for every slice.

    Args:
        x: Input rows, [N, ..., D_in]; all positions of a row use the same adapters.
        a: Down projections, [S, K, R, D_in]; lower ranks are padded with zeros.
        b: Up projections of all slices beside each other, [K, Σ D_s, R].
        widths: D_s, the outputs of each slice; multiples of 16 are read faster.
        scale: The factor s of each adapter, [K].
        index: Adapter of each row, [N], or adapters, [N, M], int64; -1 means none, and a row without one gets zeros. Or
            a `Routing` of that, which all layers of a forward share.
        weight: Weight of each of them, of index's shape; 1 if not given. Differentiable, as x, a and b are.
        ranks: True rank of each adapter, [K] or [S, K], 0 where it has none for a slice; R if not given.
        backend: `torch` (gather and batched products, anywhere), `triton` (a GPU), or `auto`: the latter where it runs.

    Returns:
        The update of each slice, [N, ..., D_s], in the dtype of `a` (under autocast, in autocast's): views of one
        tensor, not to be written to.

    Raises:
        ValueError: If the shapes disagree, or `triton` is asked for where it cannot run.
    """
    check(a.dim() == 4 and b.dim() == 3, "a and b: wanted four dimensions and three")
    slices, k, rank, width = a.shape
    if b.shape[::2] != (k, rank) or x.shape[-1] != width:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} do not fit each other and x {tuple(x.shape)}")
    if len(widths) != slices or min(widths) < 1 or sum(widths) != b.shape[1]:
        raise ValueError(f"widths: got {tuple(widths)}, wanted {slices} that are {b.shape[1]} in all")
    routing = routing_of(index, x.shape[0])
    check_shape("scale", scale, (k,))
    check_shape("weight", weight, tuple(routing.index.shape))
    check_shape("ranks", ranks, (k,) if ranks is not None and ranks.dim() == 1 else (slices, k))
    dtype = working_dtype(a)
    rows, shape = as_rows(x.to(dtype))
    weights = weight if weight is None or weight.dim() == 2 else weight[:, None]
    inputs = Inputs(rows, a.to(dtype), b.to(dtype), scale, routing.places, weights, ranks)
    chosen = resolved(backend, rows, fits=rank <= MAX_RANK, wanted=f"rank {MAX_RANK} at most")
    update = apply(inputs, list(widths), routing, chosen).reshape(*shape[:-1], b.shape[1])
    return list(update.split(list(widths), -1))
