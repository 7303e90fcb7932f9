"""`python benchmarks/kernels`, part `models`: whole models with many adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import peft
import torch
from kernels_timing import Place, Run, quartiles, ratios
from rich.progress import track
from torch import Tensor
from transformers import BertConfig, BertModel

from graftory import AdaptedModel, LoraConfig, attach, base_of, new_adapter

ROWS, RANK = 32, 8
SHAPES = {384: (6, 12), 768: (2, 12), 4096: (2, 32)}
"""Layers and heads by hidden size."""
TARGETS = {"qv": ["query", "value"], "all": ["query", "key", "value", "dense"]}
FORWARD = {
    "mixed / PEFT one": ("mixed", "PEFT one"),
    "held / PEFT one": ("held", "PEFT one"),
    "mixed / one": ("mixed", "one"),
    "mixed / base": ("mixed", "base"),
    "PEFT mixed / PEFT one": ("PEFT mixed", "PEFT one"),
    "PEFT mixed / mixed": ("PEFT mixed", "mixed"),
    "training: PEFT by adapter / mixed": ("training, PEFT by adapter", "training, mixed"),
    "training: mixed / PEFT one": ("training, mixed", "training, PEFT one"),
}


def measure_models(
    place: Place, sizes: Sequence[int], tokens: Sequence[int], counts: Sequence[int], known: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Every combination that is not known yet, as it is measured."""
    grid = [
        {"hidden": size, "linears": targets, "tokens": length, "adapters": count}
        for size in sizes
        for length in tokens
        for targets in TARGETS
        for count in counts
    ]
    there = [row["of"] for row in known]
    for of in track([of for of in grid if of not in there], "models"):
        yield one(of, place)


def one(of: dict[str, Any], place: Place) -> dict[str, Any]:
    """One combination."""
    size, targets, tokens, count = of.values()
    names = [f"a{number}" for number in range(count)]
    batch = place.moved(batch_of(ROWS, tokens))
    adapted, model, base = (
        ours(size, targets, names, place),
        theirs(size, targets, names, place),
        make_base(size, place),
    )
    rows = [names[row % count] for row in range(ROWS)]
    held = ours(size, targets, names, place)
    route = held.route(rows)
    runs: dict[str, Run] = {
        "base": still(lambda: base(**batch)),
        "one": routed(adapted, names[0], batch),
        "mixed": routed(adapted, rows, batch),
        "held": still(lambda: held(**batch)),
        "PEFT one": still(lambda: model(**batch)),
        "PEFT mixed": still(lambda: model(**batch, adapter_names=rows)),
    }
    with route:
        times = quartiles(runs, place)
    steps = trainings(adapted, model, rows, batch)
    times |= quartiles(steps, place)
    found = {"of": of, "milliseconds": {k: round(v, 3) for k, v in times.items()}, "ratios": ratios(times, FORWARD)}
    if place.device == "cuda":
        found["peak megabytes"] = {name: round(place.peak(run), 1) for name, run in steps.items()}
    return found


def trainings(adapted: AdaptedModel, model: Any, rows: list[str], batch: dict[str, Tensor]) -> dict[str, Run]:
    """Forward and backward of the same rows: mixed, PEFT with one adapter, and PEFT with each adapter's rows."""
    used = sorted(set(rows))
    adapted.train_only(*used)
    parts = {name: {key: value[mine(rows, name)] for key, value in batch.items()} for name in used}

    def mixed() -> None:
        with adapted.route(rows):
            step(lambda: adapted(**batch))

    def alone() -> None:
        model.set_adapter(used[0])
        step(lambda: model(**batch))

    def by_adapter() -> None:
        for name, part in parts.items():
            model.set_adapter(name)
            step(partial(model, **part))

    return {"training, mixed": mixed, "training, PEFT one": alone, "training, PEFT by adapter": by_adapter}


def step(call: Callable[[], Any]) -> None:
    """Forward and backward."""
    call().last_hidden_state.square().mean().backward()


def still(call: Run) -> Run:
    """Without gradients."""

    def run() -> None:
        with torch.inference_mode():
            call()

    return run


def routed(adapted: AdaptedModel, rows: str | list[str], batch: dict[str, Tensor]) -> Run:
    """A forward with its route."""

    def call() -> None:
        with adapted.route(rows):
            adapted(**batch)

    return still(call)


def mine(rows: Sequence[str], name: str) -> list[int]:
    """The rows of an adapter."""
    return [number for number, row in enumerate(rows) if row == name]


def make_base(size: int, place: Place) -> Any:
    """A random model; the same at every call."""
    torch.manual_seed(0)
    layers, heads = SHAPES[size]
    config = BertConfig(
        hidden_size=size, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * size
    )
    return BertModel(config, add_pooling_layer=False).eval().to(place.device, place.dtype)


def batch_of(rows: int, tokens: int) -> dict[str, Tensor]:
    """Random tokens."""
    ids = torch.randint(0, 30000, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ours(size: int, targets: str, names: Sequence[str], place: Place) -> AdaptedModel:
    """Our model with its adapters."""
    model, config = make_base(size, place), LoraConfig(rank=RANK, targets=(targets,))
    known = base_of(model)
    return attach(model, {name: new_adapter(model, config, base=known) for name in names}).eval()


def theirs(size: int, targets: str, names: Sequence[str], place: Place) -> Any:
    """PEFT's."""
    config = peft.LoraConfig(r=RANK, target_modules=TARGETS[targets], init_lora_weights=False)
    model = peft.get_peft_model(make_base(size, place), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()
