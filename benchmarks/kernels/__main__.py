"""One batch whose rows use different LoRA adapters: graftory, its base and its peers, in the same run.

    python benchmarks/kernels                        # models and linears on the CPU; resumable
    python benchmarks/kernels --part gpu             # the kernels on a GPU, beside vLLM's if that is installed
    python benchmarks/kernels --part gpu-models      # models on a GPU
    python benchmarks/kernels --part models --tokens 1 --adapters 32 --no-write   # a quick look

Rank 8, fp32, random weights. Every figure is the lower quartile of repeats that are interleaved with those
of its peers.

- `models`: BERT of hidden size 384 (6 layers, MiniLM's shape) and 768 (2 layers), 32 rows of 1, 16 and 64 tokens, 1 to
  64 adapters in the model, row i using adapter i (so at most 32 in one batch), on q and v or on all linears. Peers: the
  base, PEFT with one adapter for the batch, and PEFT's mixed batch (`adapter_names`), which raises in training mode, so
  that there its users' way is taken: one batch an adapter. `one` is graftory with one adapter for the batch, `held` a
  mixed batch whose route was put in force before, as in `generate`.
- `gpu-models`: `models` on a GPU, the base in bf16 and its adapters in fp32; there is hidden size 4096 (2 layers) too.
  The results are of `--sizes 384,4096 --tokens 1,64 --adapters 8`.
- `linears`: one frozen linear layer, d = 384, 64 rows of 32 tokens, all adapters learning. Peers: a loop over
  adapters, and gather and batched products, both through autograd.
- `gpu`: bf16, d = 4096, ranks 8 to 128, 1 to 8192 tokens, 1 to 256 adapters; the device's own time for a graph of the
  call, with a cold cache, as a ratio to the time that the bytes which must move take at the speed of a copy, measured.
  `eager` is the time of a call without a graph, where many follow each other; `routing` what a forward pays once for
  all its layers. Peers: a loop over adapters, gather and batched products, and vLLM's `lora_shrink` and `lora_expand`.

The results go to benchmarks/results/kernels.json, those of a GPU to kernels_gpu.json.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from kernels_gpu import measure_gpu
from kernels_linears import measure_linears
from kernels_models import measure_models
from kernels_timing import CPU, GPU
from rich.console import Console
from rich.table import Table

from graftory.versions import library_versions

RESULTS = Path(__file__).parents[1] / "results"
Rows = list[dict[str, Any]]
PARTS: Mapping[str, Callable[[argparse.Namespace, Rows], Iterator[dict[str, Any]]]] = {
    "models": lambda options, known: measure_models(CPU, options.sizes, options.tokens, options.adapters, known),
    "linears": lambda *_: measure_linears(),
    "gpu": lambda options, known: measure_gpu(options.ranks, known),
    "gpu-models": lambda options, known: measure_models(GPU, options.sizes, options.tokens, options.adapters, known),
}


def main() -> None:
    """Measure, print ratios, keep the figures."""
    options = parse()
    for part in [options.part] if options.part else ["models", "linears"]:
        measure(part, options)


def measure(part: str, options: argparse.Namespace) -> None:
    """One part; what is in the results is taken from there."""
    on_gpu = part.startswith("gpu")
    file = RESULTS / ("kernels_gpu.json" if on_gpu else "kernels.json")
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    rows: Rows = [] if options.again or part == "linears" else found.get(part, [])
    found |= {"machine": machine(gpu=on_gpu), part: rows}
    for row in PARTS[part](options, list(rows)):
        rows.append(row)
        if not options.no_write:  # after each, so that one that is broken off goes on
            file.write_text(json.dumps(found, indent=1) + "\n")
    print_table(part, rows)


def print_table(title: str, rows: Rows) -> None:
    """One line a measurement: what it is of, the time of the yardstick, and all others as ratios to that."""
    table = Table(title=title)
    for column in (*rows[0]["of"], *rows[0]["ratios"]):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row["of"].values()), *(ratio(value) for value in row["ratios"].values()))
    Console().print(table)


def ratio(value: float | None) -> str:
    """Two digits, or a dash for what was not measured."""
    return "-" if value is None else f"{value:.2f}"


def machine(*, gpu: bool) -> dict[str, Any]:
    """What this was measured on."""
    versions = library_versions()
    return {
        "processor": torch.cuda.get_device_name() if gpu and torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        **versions,
    }


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--sizes", type=numbers, default=(384, 768), help="384, 768, 4096")
    parser.add_argument("--tokens", type=numbers, default=(1, 16, 64))
    parser.add_argument("--adapters", type=numbers, default=(1, 8, 32, 64))
    parser.add_argument("--ranks", type=numbers, default=(8, 16, 64, 128), help="on a GPU")
    parser.add_argument("--again", action="store_true", help="measure anew what is in the results")
    parser.add_argument("--no-write", action="store_true")
    return parser.parse_args()


def numbers(text: str) -> tuple[int, ...]:
    """`1,16,64`."""
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    main()
