"""A tiny causal language model that has learnt to count, and made-up tasks that it is to answer in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graftory.adapter import Adapter
from graftory.continual import Report, load_sequence, run_sequence
from graftory.continual.state import RunFolder
from graftory.hub import Hub
from tests.training_samples import SPECIAL, save_base

COUNTED = 20
"""General text counts from one of the words w0 to w19 on, in steps of one or two, round and round."""
TASKS = {"height": ("w20", "w21"), "colour": ("w22", "w23"), "taste": ("w24", "w25")}
"""Words that a task is answered in; each stands for a set of three words of the text."""
SEQUENCE = """\
name: {name}
base: base
tasks: [{tasks}]
strategy: isolated
options: {{rank: 8, targets: [all]}}
train: {{max_steps: 30, epochs: 99, learning_rate: 0.01, batch_size: 8}}
limits: {{train: 32, test: 16}}
router: {{centroids: 2}}
probe: {{text: general.txt, rows: 12, max_length: 16}}
seed: 3
"""


def counting(start: int, step: int, length: int = 12) -> str:
    """A text of the general kind."""
    return " ".join(f"w{(start + place * step) % COUNTED}" for place in range(length))


def make_place(root: Path) -> Path:
    """A base model, general text, three tasks and a sequence in a folder."""
    save_base("gpt2", root / "base")
    _teach_counting(root / "base")
    texts = [counting(start, step) for start in range(COUNTED) for step in (1, 2)]
    (root / "general.txt").write_text("\n\n".join(texts) + "\n")
    for number, name in enumerate(TASKS):
        _write_task(root, name, number)
    return root


def _teach_counting(folder: Path) -> None:
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    starts = [(start, step) for start in range(COUNTED) for step in (1, 2)]
    ids = torch.tensor(
        [[len(SPECIAL) + (start + place * step) % COUNTED for place in range(12)] for start, step in starts]
    )
    for _ in range(80):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


def _write_task(root: Path, name: str, number: int) -> None:
    for split, shift in (("train", 0), ("test", 1)):
        lines = ["text,target"]
        for row in range(40):
            words = [*((row * 7 + shift + place) % COUNTED for place in range(row % 3)), 26 + number * 4 + row % 4]
            lines.append(f"{' '.join(f'w{word}' for word in words)},{TASKS[name][row % 2]}")
        (root / f"{name}-{split}.csv").write_text("\n".join(lines) + "\n")
    (root / f"{name}.yaml").write_text(
        f"name: {name}\nkind: causal_lm\ndata: {{train: {name}-train.csv, test: {name}-test.csv}}\n"
        f'text: text\ntarget: target\nmetric: exact_match\nmax_length: 16\ntemplate: "w38 {{text}}"\n'
    )


Run = tuple[Report, list[Adapter], RunFolder]


def text_run(place: Path, root: Path, strategy: str, tasks: Sequence[str] = tuple(TASKS), **changes: Any) -> Run:
    """A run without pictures: its report, its versions, its folder."""
    path = place / "sequence.yaml"
    path.write_text(SEQUENCE.format(name="run", tasks=", ".join(f"{task}.yaml" for task in tasks)))
    hub = Hub.create(root / "hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graftory.continual.runner.write_report", lambda *_: None)
        report = run_sequence(replace(load_sequence(path), strategy=strategy, **changes), hub, root / "run")
    return report, [hub.get(result.ref) for result in report.results], RunFolder(root / "run")
