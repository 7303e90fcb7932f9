"""Every row's own bottleneck adapter in one call."""

from __future__ import annotations

from torch import Tensor

from graftory.kernels.activations import ACTIVATIONS, Activation
from graftory.kernels.backend import Backend, resolved, working_dtype
from graftory.kernels.batched_bottleneck.inputs import Inputs
from graftory.kernels.batched_bottleneck.op import MAX_SIZE, apply
from graftory.kernels.routing import Routing, routing_of
from graftory.kernels.shapes import as_rows, check, check_shape

__all__ = ["Activation", "Backend", "batched_bottleneck"]


def batched_bottleneck(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: Tensor,
    index: Tensor | Routing,
    weight: Tensor | None = None,
    *,
    activation: Activation,
    keep: Tensor | None = None,
    sizes: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Each row's own bottleneck: y_i = Σ_m w_im s_k (U_k act(D_k x_i + c_k) + e_k) with k = index_im.

    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2. Run to run the bits are the same, and an adapter's
    numbers, even NaN, reach no row that does not use it.

    Args:
        x: Input rows, [N, ..., D]; all positions of a row use the same adapters.
        down: D, [K, R, D]; narrower adapters are padded with zeros.
        down_bias: c, [K, R].
        up: U, [K, D, R].
        up_bias: e, [K, D].
        scale: The factor s of each adapter, [K].
        index: Adapter of each row, [N], or adapters, [N, M], int64; -1 means none, and a row without one gets zeros. Or
            a `Routing` of that, which all layers of a forward share.
        weight: Weight of each of them, of index's shape; 1 if not given. Differentiable, as x, D, c, U and e are.
        activation: The name of act, which all K adapters share.
        keep: Multipliers of the hidden units behind act, [N, ..., M R], those of a row's places side by side: a dropout
            mask over the probability to be kept. Not differentiable.
        sizes: True number of hidden units of each adapter, [K]; R if not given. It saves work on a GPU.
        backend: `torch` (gather and batched products, anywhere), `triton` (a GPU), or `auto`: the latter where it runs.

    Returns:
        The adapters' outputs, without residual, [N, ..., D], in the dtype of `down` (under autocast, in autocast's); on
        a GPU summed in fp32.

    Raises:
        ValueError: If the shapes disagree, there is no such activation, or `triton` is asked for where it cannot run.
    """
    check(down.dim() == 3, "down: wanted 3 dimensions")
    check(activation in ACTIVATIONS, f"activation: got {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
    k, size, width = down.shape
    check_shape("x", x, (*x.shape[:-1], width))
    check_shape("down_bias", down_bias, (k, size))
    check_shape("up", up, (k, width, size))
    check_shape("up_bias", up_bias, (k, width))
    check_shape("scale", scale, (k,))
    check_shape("sizes", sizes, (k,))
    routing = routing_of(index, x.shape[0])
    check_shape("weight", weight, tuple(routing.index.shape))
    check_shape("keep", keep, (*x.shape[:-1], routing.places.shape[1] * size))
    dtype = working_dtype(down)
    rows, shape = as_rows(x.to(dtype))
    down, down_bias, up, up_bias = (tensor.to(dtype) for tensor in (down, down_bias, up, up_bias))
    weights = weight if weight is None or weight.dim() == 2 else weight[:, None]
    kept = None if keep is None else as_rows(keep.detach().to(dtype))[0]
    inputs = Inputs(rows, down, down_bias, up, up_bias, scale, routing.places, weights, kept, sizes)
    plain, wanted = routing.plain(rows, k), f"{MAX_SIZE} hidden units at most"
    chosen = resolved(backend, rows, up, fits=size <= MAX_SIZE, wanted=wanted, plain=plain)
    return apply(inputs, activation, routing, chosen).reshape(shape)
