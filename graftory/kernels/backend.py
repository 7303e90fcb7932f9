"""Which code an operation runs: torch's own products, or Triton kernels."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]
_TRITON = find_spec("triton") is not None  # here, as compilers do not look into the search
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def resolved(backend: str, *tensors: Tensor, fits: bool = True, wanted: str = "", plain: bool = False) -> str:
    """What runs: Triton where there is a GPU and its kernels take these tensors, else torch's own products.

    Args:
        backend: `auto`, `torch` or `triton`.
        tensors: What the kernels read; the first says where they would run.
        fits: Whether their sizes suit the kernels.
        wanted: Which sizes would, for the error.
        plain: Whether plain products of matrices are what a GPU is fastest at; see `Routing.plain`.

    Raises:
        ValueError: If Triton is asked for by name where it cannot run.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend: got {backend!r}, wanted auto, torch or triton")
    x = tensors[0]
    fits = fits and all(tensor.dtype in _DTYPES for tensor in tensors)
    if backend == "auto":
        return "triton" if fits and x.is_cuda and _TRITON and not plain else "torch"
    if backend == "triton" and not (fits and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")):
        got = " and ".join(dict.fromkeys(f"{tensor.dtype} on {tensor.device.type}" for tensor in tensors))
        raise ValueError(
            f"backend 'triton': got {got}; wanted fp16, bf16 or fp32 on a GPU{wanted and ', ' + wanted}; use 'auto'"
        )
    return backend


def learns(inputs: Iterable[Tensor | None]) -> bool:
    """Whether anything will ask for gradients."""
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs)


def working_dtype(adapters: Tensor) -> torch.dtype:
    """What products are made in: the dtype of the adapters, or autocast's where that is on and they are no doubles."""
    device = adapters.device.type
    if adapters.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return adapters.dtype
    return torch.get_autocast_dtype(device)
