"""`batched_scale` in torch's own products: gather each row's vector, then multiply; backward by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from graftory.kernels.batched_scale.inputs import Inputs
from graftory.kernels.gather import any_of, gather_vectors, to_adapters


def scaled(x: Tensor, vectors: Tensor, index: Tensor) -> Tensor:
    """x ⊙ l for each row, [N, T, D]; those without an adapter are copied, as times one would change a NaN's bits."""
    made = (x * gather_vectors(vectors, index[:, None])).to(x.dtype)
    unused = index < 0
    return torch.where(unused[:, None, None], x, made) if any_of(unused) else made


def backward(grad: Tensor, inputs: Inputs, *, x: bool, vectors: bool) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and the vectors, if asked for: dX = dY ⊙ l, and dl_k = Σ dY ⊙ x over k's rows, in their order."""
    grad_x = scaled(grad, inputs.vectors, inputs.adapter) if x else None
    return grad_x, _grad_vectors(grad, inputs) if vectors else None


def _grad_vectors(grad: Tensor, inputs: Inputs) -> Tensor:
    x, vectors, index = inputs
    wide = torch.promote_types(x.dtype, torch.float32)
    each = (grad.to(wide) * x).sum(1)
    return to_adapters(each, index, torch.empty_like(vectors, dtype=wide)).to(vectors.dtype)
