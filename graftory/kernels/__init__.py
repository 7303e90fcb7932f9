"""Batched mixed-adapter operations: one folder an operation, a plain torch reference beside each kernel."""

from graftory.kernels.batched_bottleneck import batched_bottleneck
from graftory.kernels.batched_lora import batched_lora

__all__ = ["batched_bottleneck", "batched_lora"]
