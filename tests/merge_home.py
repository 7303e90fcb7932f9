"""A hub with adapters that are perfect at tasks of their own: what they answer is what their tasks call right."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

from graftory import Adapter, Hub, LoraConfig
from graftory.adapter import TASK_SOURCE, Lineage
from graftory.training import LoadedBase, load_base
from graftory.training.prediction import Query, score
from tests.adapter_samples import make
from tests.training_samples import WORDS, save_base

LABELS = {"two": 2, "three": 3, "pair": 2}


@dataclass(frozen=True, slots=True)
class Home:
    """Where everything is."""

    folder: Path
    loaded: LoadedBase
    adapters: dict[str, Adapter]

    @property
    def hub(self) -> Path:
        return self.folder / "hub"

    def task(self, name: str) -> str:
        return str(self.folder / f"{name}.yaml")


def make_home(folder: Path, rows: int = 24) -> Home:
    """LoRA adapters of ranks 1, 2 and 3, with heads of 2, 3 and 2 labels; each with rows that it answers right."""
    base = save_base("bert", folder / "base")
    loaded = load_base(base, "classification")
    hub, adapters = Hub.create(folder / "hub"), {}
    draw = random.Random(0)
    for number, (name, count) in enumerate(LABELS.items()):
        made = make(loaded.model, LoraConfig(rank=number + 1), labels=count, seed=number + 1)
        assert made.spec.task is not None
        labels = made.spec.task.labels
        for split in ("train", "test"):
            texts = [" ".join(draw.choice(WORDS) for _ in range(6)) for _ in range(rows)]
            answers = score(loaded, [Query(text, made) for text in texts])
            lines = [
                f"{text},{labels[int(row.logits.argmax())]}"
                for text, row in zip(texts, answers, strict=True)
                if row.logits is not None
            ]
            (folder / f"{name}-{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
        files = ", ".join(f"{split}: {name}-{split}.csv" for split in ("train", "test"))
        text = f"name: {name}\nkind: classification\ndata: {{{files}}}\nlabel: label\nlabels: [{', '.join(labels)}]\n"
        (folder / f"{name}.yaml").write_text(text)
        task = replace(made.spec.task, name=name)
        told = Lineage("train", (), {TASK_SOURCE: str(folder / f"{name}.yaml")})
        described = replace(made.spec, base=loaded.base, task=task, lineage=told)
        adapters[name] = replace(made, spec=described)
        hub.put(name, adapters[name])
    return Home(folder, loaded, adapters)
