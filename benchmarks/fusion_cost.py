"""What it costs to fuse adapters in one forward: the base, one adapter, AdapterFusion of 2, 4 and 8, in the same run.

    OMP_NUM_THREADS=2 python benchmarks/fusion_cost.py

MiniLM's shape (BERT, 6 layers, hidden 384), random weights, bottlenecks of 48 units (pfeiffer) and LoRA of rank 8 on
q and v, 32 rows of 16 tokens, fp32. The peer is the formula as it is usually written: a loop over the adapters, their
outputs stacked, keys and values of each. Medians of interleaved repeats; the results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertModel

from graftory import Adapter, AdapterConfig, BottleneckConfig, LoraConfig, attach, new_adapter
from graftory.adapters import fusion_site
from graftory.adapters.fusion_math import Attention, Sources
from graftory.compose.fusion import new_fusion
from graftory.versions import library_versions

ROWS, TOKENS = 32, 16
FUSED = (2, 4, 8)
REPEATS = 21
KINDS: dict[str, AdapterConfig] = {"bottleneck": BottleneckConfig(), "lora": LoraConfig()}
RESULTS = Path(__file__).parent / "results" / "fusion_cost.json"
Run = Callable[[], object]


def make_base() -> Any:
    """A random model of MiniLM's shape."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return BertModel(config, add_pooling_layer=False).eval()


def batch_of(rows: int) -> dict[str, Tensor]:
    """Random tokens."""
    ids = torch.randint(0, 30000, (rows, TOKENS), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def trained(base: Any, config: AdapterConfig, seed: int) -> Adapter:
    """An adapter whose update is not zero."""
    fresh = new_adapter(base, replace(config, init_seed=seed))
    torch.manual_seed(seed)
    return replace(fresh, tensors={key: 0.02 * torch.randn_like(value) for key, value in fresh.tensors.items()})


def textbook(x: Tensor, sources: Sources, attention: Attention, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """The same as `fuse`, as the formula reads: every z_n, every K z_n, every V z_n."""
    del dropout
    hidden = functional.linear(x, sources.down, sources.down_bias)
    hidden, outputs = sources.activate(hidden), []
    for number in range(sources.owner.shape[1]):
        mine = sources.owner[:, number].bool()
        z = hidden[:, mine] @ sources.up[:, : sources.hidden_size][:, mine].T
        outputs.append(z + sources.up[:, sources.hidden_size + number] if sources.has_bias else z)
    z = torch.stack(outputs, 1)
    query = functional.linear(x, attention.query, attention.query_bias)
    keys, values = functional.linear(z, attention.key), functional.linear(z, attention.value)
    weights = (keys @ query.unsqueeze(2)).squeeze(2).softmax(-1)
    return (weights.unsqueeze(1) @ values).squeeze(1), weights


def forward(adapters: dict[str, Adapter], name: str) -> Run:
    """A forward in which every row uses one of the adapters."""
    adapted, batch = attach(make_base(), adapters).eval(), batch_of(ROWS)

    def run() -> Tensor:
        with torch.inference_mode(), adapted.route(name):
            hidden: Tensor = adapted(**batch).last_hidden_state
            return hidden

    return run


def written_out(run: Run) -> Run:
    """The same with the textbook's formula."""

    def slow() -> object:
        with mock.patch.object(fusion_site, "fuse", textbook):
            return run()

    return slow


def medians(runs: dict[str, Run]) -> dict[str, float]:
    """Milliseconds of each, interleaved so that noise hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(REPEATS + 3):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat >= 3:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(kind: str) -> dict[str, float]:
    """All runs of one kind of adapter."""
    base, batch = make_base(), batch_of(ROWS)
    adapters = [trained(base, KINDS[kind], seed) for seed in range(max(FUSED))]

    def bare() -> None:
        with torch.inference_mode():
            base(**batch)

    runs: dict[str, Run] = {"base": bare, "one": forward({"one": adapters[0]}, "one")}
    for count in FUSED:
        run = forward({"f": new_fusion(base, adapters[:count])}, "f")
        runs |= {f"fusion of {count}": run, f"textbook of {count}": written_out(run)}
        torch.testing.assert_close(run(), runs[f"textbook of {count}"](), atol=1e-4, rtol=1e-4)
    return medians(runs)


def main() -> None:
    """Measure, print ratios, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-write", action="store_true", help="leave the results as they are")
    options = parser.parse_args()
    results = {kind: measure(kind) for kind in KINDS}
    table = Table(title=f"{ROWS} rows x {TOKENS} tokens, fp32, CPU; milliseconds, and times one adapter")
    table.add_column("run")
    for kind in KINDS:
        table.add_column(f"{kind}, ms", justify="right")
        table.add_column("/ one adapter", justify="right")
    for name in next(iter(results.values())):
        cells = [(f"{row[name]:.1f}", f"{row[name] / row['one']:.2f}") for row in results.values()]
        table.add_row(name, *(cell for pair in cells for cell in pair))
    Console(width=120).print(table)
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), **library_versions()}
    if not options.no_write:
        RESULTS.write_text(json.dumps({"machine": machine, "milliseconds": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
