"""Times of several ways to do one thing, taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Run = Callable[[], object]
WARM_UP, LEAST, MOST, SECONDS = 1, 4, 60, 6.0


def quartiles(runs: Mapping[str, Run]) -> dict[str, float]:
    """Milliseconds of each, interleaved so that noise hits all alike: 4 to 60 repeats in about 6 seconds.

    The lower quartile of them: what others do on the machine makes some slower, nothing makes any faster.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for turn in range(WARM_UP + MOST):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - start))
        if turn >= WARM_UP + LEAST - 1 and time.perf_counter() - begin > SECONDS:
            break
    return {name: statistics.quantiles(values, n=4)[0] for name, values in times.items()}


def ratios(times: Mapping[str, float], pairs: Mapping[str, tuple[str, str]]) -> dict[str, float | None]:
    """Quotients by name; None where one of the two was not measured."""
    return {
        name: round(times[over] / times[under], 3) if over in times and under in times else None
        for name, (over, under) in pairs.items()
    }
