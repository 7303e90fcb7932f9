"""Sample tasks made into others: with rows held out of the training set, or with shorter texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from graftory.data import load_rows, load_task


def held_out(folder: Path, source: str, rows: int, tests: int, seed: int) -> str:
    """A sample task whose training and test rows are both drawn from its training set.

    Returns:
        The path of its file.
    """
    task = load_task(source)
    drawn = load_rows(task, "train", limit=rows + tests, seed=seed)
    parts = {"train": slice(rows), "test": slice(rows, rows + tests)}
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in parts.items():
        pairs = zip(drawn.texts[part], drawn.targets[part], strict=True)
        lines = [json.dumps({"text": text, "label": drawn.labels[int(target)]}) for text, target in pairs]
        (folder / f"{task.name}-{split}.jsonl").write_text("\n".join(lines) + "\n")
    data = {split: f"{task.name}-{split}.jsonl" for split in parts}
    described = {"kind": task.kind, "data": data, "text": "text", "label": "label", "labels": list(drawn.labels)}
    return _written(folder, {"name": task.name, **described, "max_length": task.max_length})


def shortened(folder: Path, source: str, length: int) -> str:
    """A sample task whose texts are cut to so many tokens.

    Returns:
        The path of its file.
    """
    return _written(folder, {"name": load_task(source).name, "data": {"sample": source}, "max_length": length})


def _written(folder: Path, described: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{described['name']}.yaml"
    path.write_text(yaml.safe_dump(described))
    return str(path.resolve())
