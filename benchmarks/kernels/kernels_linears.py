"""`python benchmarks/kernels`, part `linears`: one frozen linear layer and the adapters of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernels_timing import Run, quartiles, ratios
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from graftory.kernels import batched_lora, inlet

WIDTH, ROWS, TOKENS, RANK = 384, 64, 32, 8
COUNTS = (1, 8, 32, 64)
PAIRS = {
    f"{mode}{way} / base": (f"{mode}{way}", f"{mode}base")
    for mode in ("", "training, ")
    for way in ("graftory", "gather", "loop")
}
Layer = Callable[[Tensor], Tensor]
Way = Callable[[Tensor, Layer, Tensor, Tensor, Tensor], Tensor]
"""From x, the layer, all A, all B and the adapter of each row to what the layer returns with the updates."""


def measure_linears() -> Iterator[dict[str, Any]]:
    """Every number of adapters."""
    for count in track(COUNTS, "linears"):
        yield one(count)


def one(count: int) -> dict[str, Any]:
    """One number of adapters."""
    generator = torch.Generator().manual_seed(count)
    weight, bias = torch.randn(WIDTH, WIDTH, generator=generator), torch.zeros(WIDTH)
    x = torch.randn(ROWS, TOKENS, WIDTH, generator=generator, requires_grad=True)
    a = torch.randn(count, RANK, WIDTH, generator=generator, requires_grad=True)
    b = torch.randn(count, WIDTH, RANK, generator=generator, requires_grad=True)
    index = torch.arange(ROWS) % count
    grad = torch.randn(ROWS, TOKENS, WIDTH, generator=generator)
    ways: dict[str, Way] = {"base": lambda x, layer, *_: layer(x), "graftory": ours, "gather": gathered, "loop": looped}

    def layer(x: Tensor) -> Tensor:
        return functional.linear(x, weight, bias)

    def forward(way: Way) -> Run:
        def run() -> None:
            with torch.no_grad():
                way(x, layer, a, b, index)

        return run

    def train(way: Way, *learning: Tensor) -> Run:
        return lambda: torch.autograd.grad(way(x, layer, a, b, index), [x, *learning], grad)

    runs = {name: forward(way) for name, way in ways.items()} | {
        f"training, {name}": train(way) if name == "base" else train(way, a, b) for name, way in ways.items()
    }
    times = quartiles(runs)
    return {
        "of": {"adapters": count},
        "milliseconds": {name: round(value, 3) for name, value in times.items()},
        "ratios": ratios(times, PAIRS),
    }


def ours(x: Tensor, layer: Layer, a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """As adapted models do it."""
    x = inlet(x)
    return batched_lora(x, a, b, torch.ones(len(a)), index, onto=layer(x))


def gathered(x: Tensor, layer: Layer, a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """The same products, autograd's backward."""
    return layer(x) + torch.bmm(torch.bmm(x, a[index].mT), b[index].mT)


def looped(x: Tensor, layer: Layer, a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """Adapter by adapter, as PEFT does."""
    update = torch.zeros_like(x)
    for number in range(len(a)):
        rows = torch.where(index == number)[0]
        update = update.index_add(0, rows, functional.linear(functional.linear(x[rows], a[number]), b[number]))
    return layer(x) + update
