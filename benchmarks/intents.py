"""The intents of banking77 as many small tasks."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from graftory.data import load_rows, load_task


def split_intents(folder: Path, size: int) -> list[str]:
    """Task files of so many intents each; intents that are left over are left out.

    Returns:
        Their paths, in the order of the intents.
    """
    task = load_task("wheel:banking77")
    rows = {split: load_rows(task, split) for split in ("train", "test")}
    labels = rows["train"].labels
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(len(labels) // size):
        own = labels[number * size : (number + 1) * size]
        for split, part in rows.items():
            lines = [
                json.dumps({"text": text, "label": labels[int(target)]})
                for text, target in zip(part.texts, part.targets, strict=True)
                if labels[int(target)] in own
            ]
            (folder / f"intents-{number}-{split}.jsonl").write_text("\n".join(lines) + "\n")
        described = {
            "name": f"intents-{number}",
            "kind": "classification",
            "data": {split: f"intents-{number}-{split}.jsonl" for split in rows},
            "text": "text",
            "label": "label",
            "max_length": task.max_length,
        }
        (folder / f"intents-{number}.yaml").write_text(yaml.safe_dump(described))
    return [str((folder / f"intents-{number}.yaml").resolve()) for number in range(len(labels) // size)]
