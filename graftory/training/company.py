"""What is in a model beside the adapter that learns: frozen adapters, heads that learn with it, rows of other tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from graftory.adapter import Adapter, TaskKind
from graftory.adapters import AdaptedModel
from graftory.config import LoraConfig
from graftory.data import Rows, TaskFile
from graftory.errors import CorruptAdapterError
from graftory.training.base import LoadedBase
from graftory.training.encode import TASK_NUMBER, Example, encode


@dataclass(frozen=True, slots=True)
class OtherTask:
    """Rows of another task, mixed into the batches."""

    task: TaskFile
    rows: Rows
    head: str | None
    """Which of the company's heads they go through; None: the learning adapter's own."""


@dataclass(frozen=True, slots=True)
class Company:
    """What is attached beside the adapter that learns, by name."""

    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    """They stay as they are."""
    heads: Mapping[str, Adapter] = field(default_factory=dict)
    """Heads without a body; they learn too."""
    fresh: tuple[str, ...] = ()
    """Those of the heads that have learnt nothing yet."""
    others: tuple[OtherTask, ...] = ()

    def join(self, adapted: AdaptedModel) -> None:
        """Attach everything."""
        for name, adapter in {**self.adapters, **self.heads}.items():
            adapted.add(name, adapter)

    def check(self, adapted: AdaptedModel) -> None:
        """Look at every bit of what had to stay.

        Raises:
            CorruptAdapterError: If one is another.
        """
        for name, adapter in self.adapters.items():
            now = adapted.extract(name).tensors
            if not all(torch.equal(now[key], adapter.tensors[key].to(now[key].dtype)) for key in now):
                raise CorruptAdapterError(
                    f"{name} changed while another adapter learnt, though it is frozen; this is a bug of the training "
                    "code: nothing was kept"
                )

    def examples(self, loaded: LoadedBase, own: list[Example]) -> list[Example]:
        """The rows of all tasks, encoded and numbered; `own` as it is where there are no others."""
        if not self.others:
            return own
        parts = [own, *(encoded(loaded, other.task, other.rows) for other in self.others)]
        return [{**example, TASK_NUMBER: number} for number, part in enumerate(parts) for example in part]

    def kinds(self) -> Sequence[tuple[str | None, TaskKind]]:
        """Head and kind of each of the other tasks."""
        return [(other.head, other.task.kind) for other in self.others]

    def hash_with(self, rows_hash: str) -> str:
        """What a training is known by that has these rows: `rows_hash` itself where there are no others."""
        if not self.others:
            return rows_hash
        parts = [rows_hash, *(f"{other.head} {other.rows.hash}" for other in self.others)]
        return f"sha256:{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()}"


ALONE = Company()


@dataclass(frozen=True, slots=True)
class Learnt:
    """What came of a training: the adapter, and the heads that learnt with it, by name."""

    adapter: Adapter
    heads: Mapping[str, Adapter] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """The hooks' own weights."""


def encoded(loaded: LoadedBase, task: TaskFile, rows: Rows) -> list[Example]:
    """Rows with their targets as the model reads them."""
    info = rows.info(task)
    return [encode(loaded.tokenizer, info, text, y) for text, y in zip(rows.texts, rows.targets, strict=True)]


def head_of(adapter: Adapter) -> Adapter:
    """The head of an adapter without its body, whatever method that is of."""
    spec = replace(adapter.spec, config=LoraConfig())
    return Adapter(spec, adapter.head_tensors())
