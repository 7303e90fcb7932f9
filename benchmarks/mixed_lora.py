"""One batch whose rows use different LoRA adapters: the base alone, graftory, and PEFT, in the same run.

    python benchmarks/mixed_lora.py

MiniLM's shape (BERT, 6 layers, hidden 384), random weights, rank 8 on all linear layers, 32 rows of 16 tokens, fp32.
Forward: PEFT's `adapter_names`. Forward and backward: PEFT raises on a mixed batch in training mode, so its column is
what its users do: one batch an adapter. Medians of interleaved repeats; the results go to benchmarks/results/.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import BertConfig, BertModel

from graftory import LoraConfig, attach, new_adapter
from graftory.versions import library_versions

ROWS, TOKENS, RANK = 32, 16, 8
ADAPTERS = (1, 4, 8, 32)
REPEATS = 15
RESULTS = Path(__file__).parent / "results" / "mixed_lora.json"
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


def train_step(call: Callable[[], Any]) -> None:
    """Forward and backward."""
    call().last_hidden_state.square().mean().backward()


def ours(names: list[str]) -> tuple[Run, Run]:
    """graftory's forward, and forward with backward, on a mixed batch."""
    base, batch = make_base(), batch_of(ROWS)
    config = LoraConfig(rank=RANK, targets=("all",))
    adapted = attach(base, {name: new_adapter(base, config) for name in names}).eval()
    rows = [names[row % len(names)] for row in range(ROWS)]

    def forward() -> None:
        with torch.inference_mode(), adapted.route(rows):
            adapted(**batch)

    def train() -> None:
        adapted.train_only(*names)
        with adapted.route(rows):
            train_step(lambda: adapted(**batch))

    return forward, train


def theirs(names: list[str]) -> tuple[Run, Run]:
    """PEFT's forward on a mixed batch, and forward with backward adapter by adapter."""
    linears = ["query", "key", "value", "dense"]
    config = peft.LoraConfig(r=RANK, target_modules=linears, init_lora_weights=False)
    model = peft.get_peft_model(make_base(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()
    batch, part = batch_of(ROWS), batch_of(ROWS // len(names))
    rows = [names[row % len(names)] for row in range(ROWS)]

    def forward() -> None:
        with torch.inference_mode():
            model(**batch, adapter_names=rows)

    def train() -> None:
        for name in names:
            model.set_adapter(name)
            train_step(lambda: model(**part))

    return forward, train


def medians(runs: dict[str, Run]) -> dict[str, float]:
    """Milliseconds of each, interleaved so that noise hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(REPEATS + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(count: int) -> dict[str, float]:
    """All runs at one number of adapters."""
    base, batch = make_base(), batch_of(ROWS)
    names = [f"a{number}" for number in range(count)]
    (our_forward, our_train), (peft_forward, peft_train) = ours(names), theirs(names)

    def bare() -> None:
        with torch.inference_mode():
            base(**batch)

    runs = {
        "base": bare,
        "graftory": our_forward,
        "peft": peft_forward,
        "graftory, training": our_train,
        "peft, training": peft_train,
    }
    return {"adapters": count, **medians(runs)}


def main() -> None:
    """Measure, print ratios, keep the figures."""
    results = [measure(count) for count in ADAPTERS]
    table = Table(title=f"{ROWS} rows x {TOKENS} tokens, LoRA rank {RANK} on all linears, fp32, CPU")
    for column in (
        "adapters",
        "base, ms",
        "graftory / base",
        "PEFT / base",
        "PEFT / graftory",
        "training: PEFT / graftory",
    ):
        table.add_column(column, justify="right")
    for row in results:
        table.add_row(
            f"{row['adapters']:.0f}",
            f"{row['base']:.1f}",
            f"{row['graftory'] / row['base']:.2f}",
            f"{row['peft'] / row['base']:.2f}",
            f"{row['peft'] / row['graftory']:.2f}",
            f"{row['peft, training'] / row['graftory, training']:.2f}",
        )
    Console(width=120).print(table)
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), **library_versions()}
    RESULTS.write_text(json.dumps({"machine": machine, "milliseconds": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
