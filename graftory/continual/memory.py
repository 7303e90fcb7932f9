"""Rows of earlier tasks that are kept: a reservoir, bounded and the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from graftory.adapter import Adapter, TaskInfo
from graftory.adapters import AdaptedModel
from graftory.continual.heads import attached_as
from graftory.continual.strategies.base import Kept, Lesson
from graftory.data import Text
from graftory.schema import Json, decode, encode
from graftory.training import LoadedBase, RowLosses
from graftory.training.encode import Collator
from graftory.training.encode import encode as encode_row
from graftory.training.losses import mixed_losses, model_inputs


@dataclass(frozen=True, slots=True)
class Sample:
    """One row."""

    task: str
    texts: tuple[str, ...]
    """Its text, or the two of a pair."""
    target: Json
    """A label's number, a number or a text. Not typed as a number: the number of a label must stay whole."""
    logits: tuple[float, ...] = ()
    """What the model said to it when it was kept, if that is needed."""

    @property
    def text(self) -> Text:
        """As tasks have it."""
        return (self.texts[0], self.texts[1]) if len(self.texts) > 1 else self.texts[0]


@dataclass(frozen=True, slots=True)
class Memory:
    """A uniform sample of all rows seen, at most `capacity` of them."""

    samples: tuple[Sample, ...] = ()
    seen: int = 0

    def grown(self, rows: Iterable[Sample], capacity: int, seed: int) -> Memory:
        """Reservoir sampling (Vitter 1985, algorithm R): row n takes a place with probability capacity / n.

        Args:
            rows: What comes by, in order.
            capacity: The most rows that are kept.
            seed: Decides which.
        """
        samples, seen, generator = list(self.samples), self.seen, random.Random(seed)
        for row in rows:
            seen += 1
            if len(samples) < capacity:
                samples.append(row)
            elif (place := generator.randrange(seen)) < capacity:
                samples[place] = row
        return Memory(tuple(samples), seen)

    def draw(self, size: int, seed: int, step: int) -> tuple[Sample, ...]:
        """The batch of a training step, without repetition; it depends on seed and step alone, so a training that is
        resumed draws what it would have drawn.
        """
        generator = random.Random(f"{seed}/{step}")
        return tuple(generator.sample(self.samples, min(size, len(self.samples))))


def remembered(kept: Kept) -> Memory:
    """The memory that was kept, or an empty one."""
    return decode(Memory, kept.values["memory"], "memory") if "memory" in kept.values else Memory()


def as_kept(memory: Memory) -> Kept:
    """The memory as it is kept."""
    return Kept(values={"memory": encode(memory)})


def with_lesson(memory: Memory, lesson: Lesson, capacity: int, logits: Sequence[tuple[float, ...]] = ()) -> Memory:
    """The memory with the rows of a task that has been learnt.

    Args:
        memory: What was remembered before.
        lesson: The task.
        capacity: The most rows that are kept.
        logits: Of each row, if they are to be kept.
    """
    rows = lesson.rows
    samples = [
        Sample(lesson.name, (text,) if isinstance(text, str) else text, target)
        for text, target in zip(rows.texts, rows.targets, strict=True)
    ]
    if logits:
        samples = [replace(sample, logits=row) for sample, row in zip(samples, logits, strict=True)]
    return memory.grown(samples, capacity, lesson.seed_of("memory"))


@dataclass(frozen=True, slots=True)
class Replay:
    """Runs remembered rows through the adapter that learns, each with the head of its own task."""

    loaded: LoadedBase
    infos: Mapping[str, TaskInfo]
    shared: bool
    """Whether all tasks use the learning adapter's own head."""

    def logits(self, adapted: AdaptedModel, name: str, samples: Sequence[Sample]) -> tuple[Tensor, dict[str, Tensor]]:
        """Their logits, and the batch."""
        collator = Collator(self.loaded.tokenizer.pad_token_id)
        tokenizer = self.loaded.tokenizer
        examples = [encode_row(tokenizer, self.infos[s.task], s.text, s.target) for s in samples]
        batch = {key: value.to(self.loaded.model.device) for key, value in collator(examples).items()}
        heads = [None if self.shared or not self.infos[s.task].outputs else attached_as(s.task) for s in samples]
        kind = self.infos[samples[0].task].kind
        with adapted.route([name] * len(samples), heads):
            output: Any = adapted(**model_inputs(kind, batch))
        return output.logits, batch

    def losses(self, logits: Tensor, batch: Mapping[str, Tensor], samples: Sequence[Sample]) -> RowLosses:
        """The loss of each."""
        return mixed_losses([self.infos[sample.task].kind for sample in samples], logits, batch["labels"])


def replay_of(lesson: Lesson) -> Replay:
    """For the tasks of a lesson's context."""
    infos = {name: _info(adapter) for name, adapter in lesson.context.untrained.items()}
    return Replay(lesson.loaded, infos, lesson.context.scenario == "domain")


def _info(adapter: Adapter) -> TaskInfo:
    assert adapter.spec.task is not None  # the runner makes them for tasks
    return adapter.spec.task
