"""ranpac: no training but sums; a ridge head on random features of the frozen base, the same whatever the order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.config import option
from graftory.continual.checks import at_least
from graftory.continual.readout import OTHER, Readout, hidden_of
from graftory.continual.ridge import Moments, choose_strength, random_projection, solve
from graftory.continual.strategies.base import (
    Answer,
    Context,
    Finished,
    Kept,
    Lesson,
    Needs,
    Plan,
    Strategy,
    after_newest,
    own_head,
    start_from,
)
from graftory.continual.triangle import packed, unpacked
from graftory.errors import ConfigError
from graftory.training.company import Learnt
from graftory.training.features import width_of

_HELD_OUT = 5
"""Every fifth row is kept apart to choose λ; the head is then solved for all rows."""
_PARTS = ("fitted", "held")


@dataclass(frozen=True, slots=True, kw_only=True)
class RanPac(Strategy):
    """W = (G + λ I)⁻¹ C with G = Σ h hᵀ, C = Σ h yᵀ over all rows so far, h = ReLU(f P), f the pooled states of the
    base, P [d, M] random; a row's class is argmax Wᵀ h, among all classes so far, or its task's where that is known.

    Only G and C are kept, so a task adds to them and nothing can be forgotten: W is that of all rows at once, in any
    order. The held-out squared error that chooses λ comes from sums too, over the held-out rows of all tasks.
    """

    size: int = option("M, random features; 0: the features themselves", 2000)
    layer: int = option("layer whose mean-pooled states are the features; 0: the embeddings, -1: the last", -1)
    ridge: float | None = option("λ as a share of the mean of G's diagonal; none: by held-out rows", None)
    adapt: bool = option("train the adapter on the first task, and take the features with it", False)

    title: ClassVar[str] = "a ridge head on random features, from sums"
    paper: ClassVar[str] = "McDonnell et al. 2023, arXiv:2307.02251"
    stores: ClassVar[str] = "columns of C and W (G, once)"
    needs: ClassVar[Needs] = Needs(("task", "domain", "class"), heads="solves for a head")

    def __post_init__(self) -> None:
        at_least(0, size=self.size)
        if self.ridge is not None:
            at_least(1e-12, ridge=self.ridge)

    def prepare(self, lesson: Lesson) -> Plan:
        """Train the adapter on the first task if `adapt` says so, and nothing else.

        Raises:
            ConfigError: If a task is no classification.
        """
        context = lesson.context
        for name, adapter in context.untrained.items():
            if adapter.spec.task is None or adapter.spec.task.kind != "classification":
                raise ConfigError(f"strategy ranpac: task {name!r} is no classification; leave it out")
        start = start_from(context, lesson.name, context.newest())
        trains = self.adapt and not context.done
        return Plan(start, after_newest(context), context.run, trains=trains)

    def finish(self, lesson: Lesson, learnt: Learnt) -> Finished:
        """Add the task's rows to the sums and solve for the head."""
        context, labels = lesson.context, lesson.rows.labels
        first = context.done[0].adapter if context.done else learnt.adapter
        body, width = first if self.adapt else None, width_of(lesson.loaded)
        projection = self._projection(context, width)
        hidden = hidden_of(lesson.loaded, body, lesson.rows.texts, self.layer, projection, lesson.batch_size)
        classes = _classes(context.kept)
        classes += [key for key in _keys(context, lesson.name, labels) if key not in classes]
        places = [classes.index(key) for key in _keys(context, lesson.name, labels)]
        rows = torch.tensor([places[int(target)] for target in lesson.rows.targets])
        held_out = torch.arange(len(rows)) % _HELD_OUT == _HELD_OUT - 1
        sums = {
            part: _moments(context.kept, part, hidden.shape[1]).add(hidden[chosen], rows[chosen], len(classes))
            for part, chosen in zip(_PARTS, (~held_out, held_out), strict=True)
        }
        strength = self.ridge or choose_strength(sums["fitted"], sums["held"])
        weights = solve(sums["fitted"] + sums["held"], strength)
        tensors = {"weights": weights.float()}
        values = {"classes": [list(key) for key in classes], "strength": strength, "width": width}
        for part, moments in sums.items():
            tensors |= {f"{part}/gram": packed(moments.gram), f"{part}/sums": moments.sums}
            values |= {f"{part}/rows": moments.rows}
        adapter = _headless(learnt.adapter)
        return Finished(adapter, Kept(tensors, values).moved("ridge"))

    def answer(self, context: Context, task: str) -> Answer:
        """The head, cut to the task's classes where the task is known; before it knows them, the untrained one."""
        untrained = context.untrained[task]
        classes, info = _classes(context.kept), untrained.spec.task
        keys = _keys(context, task, () if info is None else info.labels)
        if not any(key in classes for key in keys):
            return Answer(None, own_head(untrained))
        weights = context.kept.under("ridge").tensors["weights"]
        asked = [i for i, key in enumerate(classes) if context.scenario != "task" or key in keys]
        labels = tuple(keys.index(classes[i]) if classes[i] in keys else OTHER for i in asked)
        body = context.done[0].adapter if self.adapt else None
        width = context.kept.under("ridge").values["width"]
        readout = Readout(self.layer, self._projection(context, int(width)), weights[:, asked], labels)
        return Answer(body, None, readout=readout)

    def _projection(self, context: Context, width: int) -> Tensor | None:
        """P, the same for all tasks of a run: from its seed."""
        seed = next(iter(context.untrained.values())).spec.config.init_seed or 0
        return random_projection(width, self.size, seed) if self.size else None


def _keys(context: Context, task: str, labels: Sequence[str]) -> list[tuple[str, str]]:
    """What a task's labels are known by: in the `domain` scenario all tasks have the same classes."""
    return [("" if context.scenario == "domain" else task, label) for label in labels]


def _classes(kept: Kept) -> list[tuple[str, str]]:
    """The classes known so far, in the order of W's columns."""
    return [(task, label) for task, label in kept.under("ridge").values.get("classes", [])]


def _moments(kept: Kept, part: str, width: int) -> Moments:
    own = kept.under(f"ridge/{part}")
    if not own.tensors:
        return Moments.none(width)
    return Moments(unpacked(own.tensors["gram"]), own.tensors["sums"], int(own.values["rows"]))


def _headless(adapter: Adapter) -> Adapter:
    """The body alone: the head that answers is not one of the model."""
    spec = adapter.spec
    task = None if spec.task is None else replace(spec.task, head=())
    return Adapter(replace(spec, task=task), adapter.body_tensors())
