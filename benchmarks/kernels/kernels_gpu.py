"""`python benchmarks/kernels`, part `gpu`: the kernels themselves, against the time that moving their bytes takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from graftory.kernels import Routing, batched_lora

WIDTH = 4096
TOKENS, COUNTS = (1, 16, 64, 256, 2048, 8192), (1, 8, 64, 256)
GATHER_TOKENS = 2048
"""Beyond so many, gathering each token's own factors does not fit."""
REPEATS, LEAST, SECONDS = 30, 5, 0.2
"""Of a measurement: fewer where they would take longer than that, as loops over hundreds of adapters do."""
FORWARD = ("graftory", "vLLM", "loop", "gather")
TRAINING = ("training, graftory", "training, loop", "training, gather")
PAIRS = {
    **{f"{name} / floor": (name, "floor") for name in FORWARD},
    **{f"{name} / floor": (name, "training, floor") for name in TRAINING},
    "vLLM / graftory": ("vLLM", "graftory"),
    "eager: vLLM / graftory": ("eager, vLLM", "eager, graftory"),
}
Run = Callable[[], object]


@dataclass(frozen=True)
class Batch:
    """Tokens that use one adapter each: x [T, 1, D], factors [K, R, D] and [K, D, R]."""

    x: Tensor
    a: Tensor
    b: Tensor
    index: Tensor
    grad: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """What learns."""
        return self.x, self.a, self.b


def measure_gpu(ranks: Sequence[int], known: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every combination that is not known yet, as it is measured.

    Raises:
        SystemExit: If there is no GPU.
    """
    if not torch.cuda.is_available():
        sys.exit("error: no GPU here; --part models and --part linears run on the CPU")
    speed = copy_speed()
    grid = [(rank, tokens, count) for rank in ranks for tokens in TOKENS for count in COUNTS if count <= tokens]
    there = [tuple(row["of"].values()) for row in known]
    for cell in track([cell for cell in grid if cell not in there], "kernels"):
        yield one(*cell, speed)


def copy_speed() -> float:
    """Bytes per second that a copy of a gigabyte reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / (microseconds(lambda: target.copy_(source)) / 1e6)


def one(rank: int, tokens: int, count: int, speed: float) -> dict[str, Any]:
    """One combination: microseconds, and what they are of others."""
    batch = drawn(rank, tokens, count)
    times = floors(rank, tokens, count, speed)
    routed = Routing(batch.index)
    updates = {"graftory": graftory(batch, routed), "loop": loop(batch), "gather": gather(batch), "vLLM": vllm(batch)}
    for name, update in updates.items():
        if update is None or (name == "gather" and tokens > GATHER_TOKENS):
            continue
        times[name] = microseconds(still(update))
        times[f"eager, {name}"] = eager(still(update))
        if f"training, {name}" in TRAINING:
            times[f"training, {name}"] = microseconds(training(update, batch))
    times["routing"] = eager(still(lambda: Routing(batch.index).tiles(1, count, 64)))
    of = {"rank": rank, "tokens": tokens, "adapters": count}
    return {"of": of, "microseconds": {k: round(v, 2) for k, v in times.items()}, "ratios": ratios(times)}


def drawn(rank: int, tokens: int, count: int) -> Batch:
    """Signed normal numbers in bf16; token i uses adapter i modulo K."""
    torch.manual_seed(0)
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    return Batch(
        x=torch.randn(tokens, 1, WIDTH, **like, requires_grad=True),
        a=(torch.randn(count, rank, WIDTH, **like) / 64).requires_grad_(),
        b=torch.randn(count, WIDTH, rank, **like).requires_grad_(),
        index=torch.arange(tokens, device="cuda") % count,
        grad=torch.randn(tokens, 1, WIDTH, **like),
    )


def floors(rank: int, tokens: int, count: int, speed: float) -> dict[str, float]:
    """Microseconds that the bytes take: inputs and update once, the factors of the adapters once.

    In training dY and x are read and dX is written besides, the factors are read again, their gradients written.
    """
    rows, factors = 2 * tokens * WIDTH, 2 * 2 * count * rank * WIDTH
    forward, backward = 2 * rows + factors, 3 * rows + 2 * factors
    return {"floor": 1e6 * forward / speed, "training, floor": 1e6 * (forward + backward) / speed}


def ratios(times: Mapping[str, float]) -> dict[str, float | None]:
    """Quotients by name; None where one of the two was not measured."""
    return {
        name: round(times[over] / times[under], 2) if over in times and under in times else None
        for name, (over, under) in PAIRS.items()
    }


def microseconds(run: Run) -> float:
    """The median of the device's own time for a captured graph, with a cold cache."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    count = repeats(graph.replay)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times: list[float] = sorted(start.elapsed_time(end) for start, end in pairs)
    return 1000 * times[count // 2]


def repeats(run: Run) -> int:
    """How many of these fit."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return max(LEAST, min(REPEATS, int(SECONDS / (time.perf_counter() - begin))))


def eager(run: Run) -> float:
    """What a call takes of the wall's clock where many follow each other, without a graph."""
    run()
    count = repeats(run)
    begin = time.perf_counter()
    for _ in range(count):
        run()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - begin) / count


def still(call: Run) -> Run:
    """Without gradients."""

    def run() -> None:
        with torch.no_grad():
            call()

    return run


def training(update: Callable[[], Tensor], batch: Batch) -> Run:
    """Forward and backward."""
    return lambda: torch.autograd.grad(update(), batch.leaves, batch.grad)


def graftory(batch: Batch, routing: Routing) -> Callable[[], Tensor]:
    """Ours, with the routing that a forward shares."""
    scale = torch.ones(len(batch.a), device="cuda")
    return lambda: batched_lora(*batch.leaves, scale, routing)


def gather(batch: Batch) -> Callable[[], Tensor]:
    """Each token's own factors, and batched products."""
    x, a, b, index = *batch.leaves, batch.index
    return lambda: torch.bmm(torch.bmm(x, a[index].mT), b[index].mT)


def loop(batch: Batch) -> Callable[[], Tensor]:
    """Adapter by adapter; the rows of each are known beforehand."""
    x, a, b = batch.leaves
    rows = [slice(number, None, len(a)) for number in range(len(a))]

    def run() -> Tensor:
        update = torch.empty_like(x)
        for number, mine in enumerate(rows):
            update[mine] = (x[mine] @ a[number].T) @ b[number].T
        return update

    return run


def vllm(batch: Batch) -> Callable[[], Tensor] | None:
    """vLLM's two kernels, as its Punica wrapper calls them; None if it is not installed."""
    try:
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
    except ImportError:
        return None
    x, a, b = (leaf.detach() for leaf in batch.leaves)
    (count, rank, _), tokens = a.shape, len(x)
    meta = LoRAKernelMeta.make(count, tokens, x.device)
    meta.prepare_tensors(batch.index.int())
    arguments = meta.meta_args(tokens, False)
    hidden = torch.zeros(1, tokens, rank, dtype=torch.float32, device=x.device)
    update = torch.zeros(tokens, b.shape[1], dtype=x.dtype, device=x.device)

    def run() -> Tensor:
        lora_shrink(x[:, 0], [a[:, None]], hidden, *arguments, 1.0)
        lora_expand(hidden, [b[:, None]], update, *arguments, offset_start=0, add_inputs=False)
        return update

    return run
