"""Times of several ways to do one thing, taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Run = Callable[[], object]
WARM_UP, LEAST, MOST = 1, 4, 60


@dataclass(frozen=True)
class Place:
    """Where is measured, in what precision, and for about how many seconds."""

    device: str
    dtype: torch.dtype
    seconds: float

    def moved(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors there."""
        return {name: each.to(self.device) for name, each in batch.items()}

    def peak(self, run: Run) -> float:
        """Megabytes of a GPU that a run needs beyond what is there."""
        there = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - there) / 2**20

    def settle(self) -> None:
        """Wait until all that was begun there is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()


CPU = Place("cpu", torch.float32, 6.0)
GPU = Place("cuda", torch.bfloat16, 1.0)


def quartiles(runs: Mapping[str, Run], place: Place = CPU) -> dict[str, float]:
    """Milliseconds of each, interleaved so that noise hits all alike: 4 to 60 repeats in about the place's time.

    The lower quartile of them: what others do on the machine makes some slower, nothing makes any faster.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for turn in range(WARM_UP + MOST):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            place.settle()
            if turn >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - start))
        if turn >= WARM_UP + LEAST - 1 and time.perf_counter() - begin > place.seconds:
            break
    return {name: statistics.quantiles(values, n=4)[0] for name, values in times.items()}


def ratios(times: Mapping[str, float], pairs: Mapping[str, tuple[str, str]]) -> dict[str, float | None]:
    """Quotients by name; None where one of the two was not measured."""
    return {
        name: round(times[over] / times[under], 3) if over in times and under in times else None
        for name, (over, under) in pairs.items()
    }
