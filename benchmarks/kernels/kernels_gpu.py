"""`python benchmarks/kernels`, part `gpu`: the kernels themselves, against the time that moving their bytes takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from graftory.kernels import batched_lora

WIDTH = 4096
RANKS, TOKENS, COUNTS = (8, 16, 64, 128), (1, 16, 64, 256, 2048, 8192), (1, 8, 64, 256)
GATHER_TOKENS = 2048
"""Beyond so many, gathering each token's own factors does not fit."""
NAMES = ("forward", "backward", "loop", "gather", "vLLM")
Run = Callable[[], object]


def measure_gpu() -> Iterator[dict[str, Any]]:
    """Every combination, as it is measured.

    Raises:
        SystemExit: If there is no GPU.
    """
    if not torch.cuda.is_available():
        sys.exit("error: no GPU here; --part models and --part linears run on the CPU")
    speed = copy_speed()
    grid = [(rank, tokens, count) for rank in RANKS for tokens in TOKENS for count in COUNTS if count <= tokens]
    for cell in track(grid, "kernels"):
        yield one(*cell, speed)


def copy_speed() -> float:
    """Bytes per second that a copy of a gigabyte reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / (milliseconds(lambda: target.copy_(source)) / 1000)


def one(rank: int, tokens: int, count: int, speed: float) -> dict[str, Any]:
    """One combination: times as multiples of the floor."""
    torch.manual_seed(0)
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.randn(tokens, 1, WIDTH, **like, requires_grad=True)
    a = (torch.randn(count, rank, WIDTH, **like) / 64).requires_grad_()
    b = torch.randn(count, WIDTH, rank, **like).requires_grad_()
    scale, index = torch.ones(count, device="cuda"), torch.arange(tokens, device="cuda") % count
    y = batched_lora(x, a, b, scale, index)
    grad = torch.randn_like(y)
    # input and update once, the factors of the adapters in use once
    floor = 1000 * 2 * (2 * tokens * WIDTH + 2 * count * rank * WIDTH) / speed
    runs: dict[str, Run | None] = {
        "forward": still(lambda: batched_lora(x, a, b, scale, index)),
        "backward": lambda: torch.autograd.grad(y, (x, a, b), grad, retain_graph=True),
        "loop": still(lambda: looped(x, a, b, index)),
        "gather": still(lambda: torch.bmm(torch.bmm(x, a[index].mT), b[index].mT)) if tokens <= GATHER_TOKENS else None,
        "vLLM": vllm(x.detach()[:, 0], a.detach(), b.detach(), index),
    }
    times = {name: milliseconds(run) for name, run in runs.items() if run is not None}
    return {
        "of": {"rank": rank, "tokens": tokens, "adapters": count, "floor, µs": round(1000 * floor, 2)},
        "milliseconds": times,
        "ratios": {name: round(times[name] / floor, 2) if name in times else None for name in NAMES},
    }


def milliseconds(run: Run) -> float:
    """The median of 50 calls, by the device's own clock, with a cold cache."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for _ in range(5):
        run()
    times: list[float] = []
    for _ in range(50):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def still(call: Run) -> Run:
    """Without gradients."""

    def run() -> None:
        with torch.no_grad():
            call()

    return run


def looped(x: Tensor, a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """Adapter by adapter; the rows of each are known beforehand."""
    update = torch.empty_like(x)
    for number in range(len(a)):
        rows = slice(number, None, len(a))
        update[rows] = (x[rows] @ a[number].T) @ b[number].T
    del index
    return update


def vllm(x: Tensor, a: Tensor, b: Tensor, index: Tensor) -> Run | None:
    """vLLM's two kernels, as its Punica wrapper calls them; None if it is not installed."""
    try:
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
    except ImportError:
        return None
    count, rank, _ = a.shape
    meta = LoRAKernelMeta.make(count, len(x), x.device)
    meta.prepare_tensors(index.int())
    hidden = torch.zeros(1, len(x), rank, dtype=torch.float32, device=x.device)
    update = torch.zeros(len(x), b.shape[1], dtype=x.dtype, device=x.device)

    def run() -> None:
        arguments = meta.meta_args(len(x), False)
        lora_shrink(x, [a[:, None]], hidden, *arguments, 1.0)
        lora_expand(hidden, [b[:, None]], update, *arguments, offset_start=0, add_inputs=False)

    return run
