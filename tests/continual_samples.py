"""A tiny random BERT and made-up tasks whose rows can be told by their words, for sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from graftory.adapter import Adapter
from graftory.continual import Report, load_sequence, run_sequence
from graftory.continual.state import RunFolder
from graftory.hub import Hub

TASKS = {
    "colours": {"warm": ["red", "orange", "pink"], "cold": ["blue", "teal", "navy"]},
    "animals": {"bird": ["owl", "crow"], "fish": ["cod", "eel"], "insect": ["bee", "ant"]},
    "tools": {"cut": ["saw", "knife"], "hit": ["hammer", "mallet"]},
}
FILLERS = {"colours": ["paint", "wall"], "animals": ["zoo", "river"], "tools": ["shed", "bench"]}
SEQUENCE = """\
name: {name}
base: base
tasks: [{tasks}]
strategy: {strategy}
options: {{rank: 8, targets: [all]}}
train: {{epochs: 10, learning_rate: 0.01, batch_size: 8}}
limits: {{train: 48, test: 30}}
router: {{centroids: 2}}
seed: 3
"""


def make_place(root: Path) -> Path:
    """Put a base model and three tasks into a folder."""
    words = [word for task in TASKS.values() for group in task.values() for word in group]
    words += [word for group in FILLERS.values() for word in group]
    (root / "base").mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (root / "base" / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(vocab=str(root / "base" / "vocab.txt")).save_pretrained(root / "base")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=len(vocabulary), intermediate_size=48, initializer_range=0.2, **sizes)
    )
    model.save_pretrained(root / "base")
    for name in TASKS:
        write_task(root, name)
    return root


def write_task(root: Path, name: str) -> None:
    """A task file with its rows."""
    generator = torch.Generator().manual_seed(len(name))

    def pick(items: Sequence[str]) -> str:
        return items[int(torch.randint(len(items), (1,), generator=generator))]

    for split, n in (("train", 64), ("test", 40)):
        lines = ["text,label"]
        for _ in range(n):
            label = pick(list(TASKS[name]))
            tokens = [pick(TASKS[name][label]), *(pick(FILLERS[name]) for _ in range(len(lines) % 3))]
            lines.append(f"{' '.join(tokens)},{label}")
        (root / f"{name}-{split}.csv").write_text("\n".join(lines) + "\n")
    (root / f"{name}.yaml").write_text(
        f"name: {name}\nkind: classification\ndata: {{train: {name}-train.csv, test: {name}-test.csv}}\n"
        "text: text\nlabel: label\nmax_length: 16\n"
    )


def sequence_file(place: Path, strategy: str, tasks: Sequence[str] = tuple(TASKS), name: str = "run") -> Path:
    """A sequence file beside the tasks."""
    path = place / f"{name}-{strategy}-{'-'.join(tasks)}.sequence.yaml"
    files = ", ".join(f"{task}.yaml" for task in tasks)
    path.write_text(SEQUENCE.format(name=name, tasks=files, strategy=strategy))
    return path


SHORT = {"max_steps": 12, "learning_rate": 0.01, "batch_size": 8}
Run = tuple[Report, list[Adapter], RunFolder]


def short_run(place: Path, root: Path, strategy: str, tasks: Sequence[str], **changes: Any) -> Run:
    """A run of a few steps a task, without pictures, which take longer: its report, its versions, its folder."""
    sequence = replace(load_sequence(sequence_file(place, "isolated", tasks)), strategy=strategy)
    hub = Hub.create(root / "hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graftory.continual.runner.write_report", lambda *_: None)
        report = run_sequence(replace(sequence, **{"train": SHORT, **changes}), hub, root / "run")
    return report, [hub.get(result.ref) for result in report.results], RunFolder(root / "run")
