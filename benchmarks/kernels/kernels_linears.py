"""`python benchmarks/kernels`, part `linears`: one frozen linear layer and the adapters of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernels_timing import Run, quartiles, ratios
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from graftory.kernels import batched_lora

WIDTH, ROWS, TOKENS, RANK = 384, 64, 32, 8
COUNTS = (1, 8, 32, 64)
PAIRS = {
    f"{mode}{way} / base": (f"{mode}{way}", f"{mode}base")
    for mode in ("", "training, ")
    for way in ("graftory", "gather", "loop")
}
Update = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


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
    scale = torch.ones(count)
    updates: dict[str, Update] = {
        "graftory": lambda x, a, b, index: batched_lora(x, a, b, scale, index),
        "gather": lambda x, a, b, index: torch.bmm(torch.bmm(x, a[index].mT), b[index].mT),
        "loop": looped,
    }
    grad = torch.randn(ROWS, TOKENS, WIDTH, generator=generator)

    def base() -> Tensor:
        return functional.linear(x, weight, bias)

    def forward(update: Update | None) -> Run:
        def run() -> None:
            with torch.no_grad():
                _ = base() if update is None else update(x, a, b, index).add_(base())

        return run

    def train(update: Update | None) -> Run:
        def run() -> None:
            y = base() if update is None else base() + update(x, a, b, index)
            torch.autograd.grad(y, [x] if update is None else [x, a, b], grad)

        return run

    ways: dict[str, Update | None] = {"base": None, **updates}
    runs = {name: forward(way) for name, way in ways.items()} | {
        f"training, {name}": train(way) for name, way in ways.items()
    }
    times = quartiles(runs)
    return {
        "of": {"adapters": count},
        "milliseconds": {name: round(value, 3) for name, value in times.items()},
        "ratios": ratios(times, PAIRS),
    }


def looped(x: Tensor, a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """Adapter by adapter, as PEFT does."""
    update = torch.zeros_like(x)
    for number in range(len(a)):
        rows = torch.where(index == number)[0]
        update = update.index_add(0, rows, functional.linear(functional.linear(x[rows], a[number]), b[number]))
    return update
