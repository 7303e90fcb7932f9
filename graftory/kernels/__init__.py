"""Batched mixed-adapter operations: one folder an operation, a plain torch reference beside each kernel."""

from graftory.kernels.batched_bottleneck import batched_bottleneck
from graftory.kernels.batched_head import batched_head
from graftory.kernels.batched_lora import batched_lora
from graftory.kernels.batched_lora_slices import batched_lora_slices
from graftory.kernels.batched_scale import batched_scale
from graftory.kernels.inlet import inlet
from graftory.kernels.routing import Routing

__all__ = [
    "Routing",
    "batched_bottleneck",
    "batched_head",
    "batched_lora",
    "batched_lora_slices",
    "batched_scale",
    "inlet",
]
