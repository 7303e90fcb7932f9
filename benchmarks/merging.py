"""What merging costs, and what it gets right: our methods beside PEFT's `add_weighted_adapter`, in the same run.

    OMP_NUM_THREADS=1 python benchmarks/merging.py        # about five minutes on a quiet core
    OMP_NUM_THREADS=1 python benchmarks/merging.py --parts svd,sum,llama --methods svd

svd, ties: One linear layer of 4096 x 4096, four LoRAs of rank 16, merged and cut to rank 16: our `svd` and PEFT's, our
    `ties` and PEFT's `ties_svd`. PEFT's run once each, our `svd` several times before and after. The difference of the
    results is a share of the update.
sum: Our `linear` and PEFT's `linear` against Σ w ΔW in float64, for equal ranks, and ours for mixed ones.
smollm2, llama: All linear layers of SmolLM2-135M and of Llama-3-8B, four LoRAs of rank 16 with random factors: seconds
    of each method, and the most memory above the adapters themselves. `ties` has to make ΔW: for SmolLM2 only.
export: the most memory of `hub export`, compared and not, as a share of the model's bytes; see export_memory.py. It
    reads the three models of the catalogue and is run only where it is named.
mergekit: from adapters to one plain model, beside mergekit's command, whose path is given by --mergekit; see
    merging_mergekit.py. Run only where it is named.
accuracy: what merges of six MiniLM adapters keep of each task, ours and PEFT's; see merging_accuracy.py. It takes
    hours, goes on where it was cut off, and is run only where it is named; the table is results/merging.md, too.
    A quick look: --parts accuracy --seeds 0 --tasks trec,sms --train-rows 200 --test-rows 100 --no-write

Seconds are given by the wall's clock and as time on the processor: on one thread they are equal where nothing else
runs, and the second is the one to compare where something does. The results go to benchmarks/results/merging.json;
parts that are not run keep what they had.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import export_memory
import merging_accuracy
import merging_mergekit
import peft
import torch
from merging_accuracy_report import markdown
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from torch import Tensor

from graftory import Adapter, AdapterSpec, BaseModel, LoraConfig, merge
from graftory.compose import METHODS
from graftory.compose.merge.base import MergeParameters
from graftory.versions import library_versions

RESULTS = Path(__file__).parent / "results" / "merging.json"
SLOW = {"accuracy", "export", "mergekit"}
ADAPTERS, RANK, WIDTH = 4, 16, 4096
WEIGHTS = (0.4, 0.3, 0.2, 0.1)
MIXED = (4, 8, 16, 32)
DENSITY = 0.2
Shapes = Mapping[str, tuple[int, int]]
"""(d_out, d_in) by path."""


def decoder(layers: int, hidden: int, key: int, inner: int) -> Shapes:
    """The linear layers of a Llama."""
    one = {"q": (hidden, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, hidden)}
    one |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return {f"layers.{number}.{name}_proj": shape for number in range(layers) for name, shape in one.items()}


MODELS: Mapping[str, tuple[Shapes, Sequence[str]]] = {
    "smollm2": (decoder(30, 576, 192, 1536), ("linear", "svd", "tsv", "iso_c", "knots", "core", "ctm", "ties")),
    "llama": (decoder(32, 4096, 1024, 14336), ("linear", "svd", "tsv", "iso_c", "core", "ctm")),
}
"""Shapes, and the methods to run."""


def adapters(shapes: Shapes, ranks: Sequence[int]) -> list[Adapter]:
    """LoRAs with random factors."""
    made = []
    for seed, rank in enumerate(ranks):
        generator, tensors = torch.Generator().manual_seed(seed), {}
        for path, (d_out, d_in) in shapes.items():
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            tensors[f"{path}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) * 0.02
        config = LoraConfig(targets=tuple(shapes), rank=rank, alpha=float(rank))
        made.append(Adapter(AdapterSpec(BaseModel("random"), config), tensors))
    return made


def update(adapter: Adapter, path: str) -> Tensor:
    """ΔW in float64."""
    config = adapter.spec.config
    assert isinstance(config, LoraConfig)
    a, b = (adapter.tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
    return config.scale_of(path) * b @ a


def relative(got: Tensor, wanted: Tensor) -> float:
    """The difference as a share of what is wanted, in the Frobenius norm."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


class Memory:
    """The most resident memory while a block runs, above what there was before, sampled every few milliseconds."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else what an earlier run has freed is taken again without being seen
        self.above, self._peak, self._before = 0, 0, resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.above = max(0, self._peak - self._before)

    def _watch(self) -> None:
        while not self._done.wait(0.003):
            self._peak = max(self._peak, resident())


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """What one call takes, by the wall's clock and on the processor."""
    start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def peft_layer(parts: Sequence[Adapter], path: str) -> tuple[Any, Any]:
    """PEFT's model of one linear layer with the same LoRAs, and that layer."""
    d_in = parts[0].tensors[f"{path}.lora_A.weight"].shape[1]
    d_out = parts[0].tensors[f"{path}.lora_B.weight"].shape[0]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[path])
    model: Any = peft.get_peft_model(torch.nn.ModuleDict({path: torch.nn.Linear(d_in, d_out)}), config, "0")
    for number in range(1, len(parts)):
        model.add_adapter(str(number), config)
    layer = model.base_model.model[path]
    for number, adapter in enumerate(parts):
        for side, linear in (("A", layer.lora_A), ("B", layer.lora_B)):
            linear[str(number)].weight.data.copy_(adapter.tensors[f"{path}.lora_{side}.weight"])
    return model.base_model, layer


def one_layer(method: str) -> dict[str, Any]:
    """Our merge of one layer and PEFT's."""
    path = "q_proj"
    parts = adapters({path: (WIDTH, WIDTH)}, [RANK] * ADAPTERS)
    model, layer = peft_layer(parts, path)
    ties: Any = METHODS["ties"].params
    if method == "svd":
        ours = partial(merge, parts, "svd", weights=WEIGHTS, rank=RANK)
        peer = partial(add, model, WEIGHTS, "merged", combination_type="svd")
    else:
        ours = partial(merge, parts, "ties", parameters=ties(density=DENSITY, rank=RANK))
        peer = partial(add, model, [1.0] * ADAPTERS, "merged", combination_type="ties_svd", density=DENSITY)
    return beside(ours, peer, (path, layer), repeats=5 if method == "svd" else 0)


def add(model: Any, weights: Sequence[float], name: str, **options: Any) -> None:
    """PEFT's merge."""
    names = [str(number) for number in range(len(weights))]
    model.add_weighted_adapter(names, list(weights), name, svd_rank=RANK, **options)


def beside(
    ours: Callable[[], Adapter], peer: Callable[[], None], where: tuple[str, Any], repeats: int
) -> dict[str, float]:
    """Seconds of both and the difference of their results; ours also some times before and after."""
    path, layer = where
    made: list[Adapter] = []
    times = [seconds(lambda: made.append(ours())), *(seconds(ours) for _ in range(repeats))]
    theirs = seconds(peer)
    times += [seconds(ours) for _ in range(repeats)]
    wall, processor = (statistics.median(one) for one in zip(*times, strict=True))
    return {
        "our_seconds": wall,
        "our_processor_seconds": processor,
        "peft_seconds": theirs[0],
        "peft_processor_seconds": theirs[1],
        "times_faster": theirs[0] / wall,
        "times_faster_on_the_processor": theirs[1] / processor,
        "relative_difference": relative(update(made[0], path), layer.get_delta_weight("merged").detach()),
    }


def exactness() -> dict[str, float]:
    """Errors of the sum."""
    path = "q_proj"
    found = {}
    for what, ranks in (("equal ranks", [RANK] * ADAPTERS), ("mixed ranks", list(MIXED))):
        parts = adapters({path: (WIDTH // 4, WIDTH // 4)}, ranks)
        exact = sum(weight * update(one, path) for weight, one in zip(WEIGHTS, parts, strict=True))
        assert isinstance(exact, Tensor)
        found[f"linear, {what}"] = relative(update(merge(parts, weights=WEIGHTS), path), exact)
        if what == "equal ranks":
            model, layer = peft_layer(parts, path)
            names = [str(number) for number in range(ADAPTERS)]
            model.add_weighted_adapter(names, list(WEIGHTS), "sum", combination_type="linear")
            found[f"PEFT's linear, {what}"] = relative(layer.get_delta_weight("sum").detach(), exact)
    return found


def whole_model(name: str, only: Sequence[str]) -> dict[str, Any]:
    """Seconds and memory of methods on all layers of a model."""
    shapes, methods = MODELS[name]
    parts = adapters(shapes, [RANK] * ADAPTERS)
    found: dict[str, Any] = {"adapters_mb": sum(t.nbytes for part in parts for t in part.tensors.values()) / 1e6}
    for method in only or methods:
        kind: Any = METHODS[method].params
        parameters: MergeParameters = kind() if method == "linear" else kind(rank=RANK)
        with Memory() as memory:
            wall, processor = seconds(partial(merge, parts, method, parameters=parameters))
        found[method] = {"seconds": wall, "processor_seconds": processor, "mb_above": memory.above / 1e6}
    return found


def named(options: argparse.Namespace) -> list[str]:
    """The methods that were asked for."""
    return [name for name in options.methods.split(",") if name]


PARTS: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "svd": lambda _: one_layer("svd"),
    "ties": lambda _: one_layer("ties"),
    "sum": lambda _: exactness(),
    "smollm2": lambda options: whole_model("smollm2", named(options)),
    "llama": lambda options: whole_model("llama", named(options)),
    "export": lambda _: export_memory.measured(),
    "mergekit": lambda options: merging_mergekit.measured(options.mergekit),
    "accuracy": merging_accuracy.accuracy,
}


def main() -> None:
    """Measure, print, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(name for name in PARTS if name not in SLOW), help="what to run")
    parser.add_argument("--methods", default="", help="of smollm2, llama and accuracy, only these")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--mergekit", type=Path, help="path of the command mergekit-yaml")
    merging_accuracy.arguments(parser)
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["machine"] = {"processor": platform.machine(), "threads": torch.get_num_threads(), **library_versions()}
    for part in options.parts.split(","):
        found = PARTS[part](options)
        if part == "accuracy":
            # what was measured on other rows stays beside it
            found = {**results.get(part, {}), str(options.test_rows): found}
            Console().print(Markdown(markdown(found)))
        else:
            show(part, found)
        results[part] = found
        if not options.no_write:
            if part == "accuracy":
                RESULTS.with_suffix(".md").write_text(markdown(found))
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def show(part: str, rows: Mapping[str, Any]) -> None:
    """One table."""
    figures = list(dict.fromkeys(key for row in rows.values() if isinstance(row, dict) for key in row))
    table = Table(part, *(key.replace("_", " ") for key in figures or ["figure"]))
    for name, row in rows.items():
        cells = [row[key] for key in figures] if isinstance(row, dict) else [row]
        table.add_row(name, *("-" if cell is None else f"{cell:.3g}" for cell in cells))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
