"""`batched_lora_slices` on a GPU: `batched_lora`'s kernels, with slices on the last axis of the grid."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graftory.kernels.batched_lora import launch
from graftory.kernels.batched_lora.inputs import Gradients, Inputs, Needed
from graftory.kernels.routing import Routing


def forward(inputs: Inputs, widths: Sequence[int], routing: Routing, *, keep: bool) -> tuple[Tensor, Tensor]:
    """As `gathered.forward`, in two launches; S is [S, E, R] in fp32, and only made whole if it is to be kept."""
    batch, columns = launch.batch_of(inputs, routing), launch.columns_of(tuple(widths), inputs.b.device)
    hidden = launch.shrink(batch.tokens, inputs.a, batch, split=not keep)
    update = launch.expand(hidden, inputs.b.transpose(1, 2)[None], batch, columns=columns)
    return launch.rows_of(update, inputs.x), hidden[:, 0] if keep else hidden.new_empty(0)


def backward(
    grad: Tensor, hidden: Tensor, inputs: Inputs, widths: Sequence[int], routing: Routing, needed: Needed
) -> Gradients:
    """As `gathered.backward`, in a launch each for G = dY B, dX, dA and dB."""
    x, a, b = inputs[:3]
    batch, columns = launch.batch_of(inputs, routing), launch.columns_of(tuple(widths), b.device)
    flat = grad.reshape(-1, grad.shape[-1])
    inner = launch.shrink(flat, b.transpose(1, 2)[None], batch, split=False, columns=columns)
    grad_x = grad_a = grad_b = grad_weight = None
    if needed.x:
        grad_x = launch.rows_of(launch.expand(inner, a, batch), x)
    if needed.a:
        grad_a = launch.empty(tuple(a.shape), a.dtype, a.device)
        launch.outer(inner[:, 0], batch.tokens, grad_a, batch)
    if needed.b:
        grad_b = launch.empty(tuple(b.shape), b.dtype, b.device)
        launch.outer(hidden, flat, grad_b.transpose(1, 2)[None], batch, columns=columns)
    if needed.weight:
        grad_weight = launch.weight_gradient_of(inner[:, 0], hidden, inputs, batch)
    return Gradients(grad_x, grad_a, grad_b, grad_weight)
