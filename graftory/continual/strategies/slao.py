"""slao: one LoRA, merged after every task. What is stored does not grow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.continual.stack import DOWN, UP
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
    newest_answers,
    start_from,
)
from graftory.training.company import Learnt

_DOWN, _UP = f".{DOWN['lora']}", f".{UP['lora']}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slao(Strategy):
    """Task t > 1:

    1. Q R = A_{t−1}ᵀ; start from A = Qᵀ and B = B_{t−1}, both as task t−1 left them before merging.
    2. Train A and B to A_t and B_t.
    3. A_m ← A_t; B_m ← B_m + (B_t − B_m) / √t.

    Rows are answered by B_m A_m with the task's head.
    """

    title: ClassVar[str] = "one adapter, merged after every task"
    paper: ClassVar[str] = "Qiao and Mahdavi 2025, arXiv:2512.23017"
    stores: ClassVar[str] = "head (adapter and one more B, once)"
    needs: ClassVar[Needs] = Needs(("task", "domain"), methods=("lora",))

    def prepare(self, lesson: Lesson) -> Plan:
        """Step 1."""
        context, newest = lesson.context, lesson.context.newest()
        start = start_from(context, lesson.name, newest)
        if newest is not None:
            rows = {key: orthonormal(a) for key, a in newest.body_tensors().items() if key.endswith(_DOWN)}
            ups = context.kept.under("b").tensors
            start = Adapter(start.spec, {**start.tensors, **rows, **ups})
        return Plan(start, after_newest(context), context.run)

    def finish(self, lesson: Lesson, learnt: Learnt) -> Finished:
        """Step 3."""
        newest, body = lesson.context.newest(), learnt.adapter.body_tensors()
        ups = {key: b for key, b in body.items() if key.endswith(_UP)}
        kept = Kept(ups).moved("b")
        if newest is None:
            return Finished(learnt.adapter, kept)
        merged = {
            key: newest.tensors[key] + (b - newest.tensors[key]) / math.sqrt(lesson.number) for key, b in ups.items()
        }
        return Finished(Adapter(learnt.adapter.spec, {**learnt.adapter.tensors, **merged}), kept)

    def answer(self, context: Context, task: str) -> Answer:
        """The merged adapter with the task's head."""
        return newest_answers(context, task)


def orthonormal(a: Tensor) -> Tensor:
    """Qᵀ of Q R = Aᵀ, with the signs that make the diagonal of R positive: orthonormal rows that span those of A.

    Args:
        a: A, [r, d] with r ≤ d.
    """
    q, r = torch.linalg.qr(a.T)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    rows: Tensor = (q * signs).T.contiguous()
    return rows
