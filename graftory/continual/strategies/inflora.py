"""inflora: every task learns in a subspace that earlier tasks' inputs do not reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.config import option
from graftory.continual.checks import share
from graftory.continual.passes import second_moments
from graftory.continual.stack import BIASES, DOWN, units_of
from graftory.continual.strategies.added import Added
from graftory.continual.strategies.base import Finished, Kept, Lesson, Needs, Plan
from graftory.training.company import Learnt

_NONE = 1e-6
"""Of the inputs' energy: directions with less than this are the rounding of their sums in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InfLora(Added):
    """At each layer, with M an orthonormal basis of what earlier tasks' inputs span:

    1. C = Σ x xᵀ over the new task's inputs x; Ĉ = (1 − M Mᵀ) C (1 − M Mᵀ).
    2. Rows of A_t: the r leading eigenvectors of Ĉ, of the length that a fresh A has. A_t M = 0, and A_t is frozen.
    3. Train B_t beside Σ_{i<t} B_i A_i, which is frozen.
    4. With C of the inputs now: append the leading eigenvectors of (1 − M Mᵀ) C (1 − M Mᵀ) to M, as few as make
       tr(Mᵀ C M) ≥ ε tr(C).

    Rows are answered by Σ_i B_i A_i with the task's head. Of a bottleneck A is the map down, and its biases stay 0, so
    that what A_t does not see changes nothing. Where fewer than r directions are left, A_t has rows of zeros.
    """

    energy: float = option("ε, the share of the inputs' energy that the basis has to hold", 0.95)
    rows: int = option("rows of a task from which its inputs are taken", 500)

    title: ClassVar[str] = "adapters in the complement of earlier inputs, added up"
    paper: ClassVar[str] = "Liang and Li 2024, arXiv:2404.00228"
    stores: ClassVar[str] = "adapter, head, basis"
    needs: ClassVar[Needs] = Needs(("task", "domain"))

    def __post_init__(self) -> None:
        share(energy=self.energy)

    def prepare(self, lesson: Lesson) -> Plan:
        """Steps 1 to 3."""
        plan = Added.prepare(self, lesson)
        down, *biases = (DOWN[plan.start.spec.method], *BIASES[plan.start.spec.method])
        # what the new task reads while the earlier sum is in force
        reader = lesson.context.newest() or plan.start
        moments = self._moments(lesson, reader)
        designed = {}
        for path in plan.start.spec.config.targets:
            basis = lesson.context.kept.tensors.get(f"basis/{path}")
            designed[f"{path}.{down}"] = directions(moments[path], basis, units_of(plan.start.spec.config, path))
        start = Adapter(plan.start.spec, {**plan.start.tensors, **designed})
        return replace(plan, start=start, hooks=replace(plan.hooks, frozen=(f".{down}", *(f".{b}" for b in biases))))

    def finish(self, lesson: Lesson, learnt: Learnt) -> Finished:
        """Step 4, and the sum."""
        total = self.sum_with(lesson, learnt.adapter)
        kept = {}
        for path, moment in self._moments(lesson, total).items():
            basis = lesson.context.kept.tensors.get(f"basis/{path}")
            kept[f"basis/{path}"] = grown(basis, moment, self.energy)
        return Finished(total, Kept(kept))

    def _moments(self, lesson: Lesson, adapter: Adapter) -> Mapping[str, Tensor]:
        some = lesson.rows.subsample(self.rows, lesson.seed_of("inputs"))
        return second_moments(lesson.loaded, adapter, lesson.task, some, lesson.batch_size)


def directions(moment: Tensor, basis: Tensor | None, rank: int) -> Tensor:
    """The leading eigenvectors of (1 − M Mᵀ) C (1 − M Mᵀ), times 1/√3.

    That is the length of a row of A as `nn.Linear` draws it, so the learning rate means the same.

    Args:
        moment: C, [d, d], fp64.
        basis: M, [d, k], orthonormal columns; None if there is nothing to avoid.
        rank: How many; rows of zeros where there are not so many.

    Returns:
        [rank, d], fp32.
    """
    size = len(moment)
    vectors, values = _leading(moment, basis, min(rank, size))
    rows = torch.zeros(rank, size, dtype=moment.dtype)
    used = int((values > _NONE * moment.trace()).sum())
    rows[:used] = vectors[:, :used].T
    return (rows / 3**0.5).float()


def grown(basis: Tensor | None, moment: Tensor, energy: float) -> Tensor:
    """M with as few more directions of the inputs as make tr(Mᵀ C M) ≥ ε tr(C).

    Args:
        basis: M, [d, k]; None if it is empty.
        moment: C, [d, d], fp64.
        energy: ε.

    Returns:
        [d, k'], fp64, orthonormal columns.
    """
    vectors, values = _leading(moment, basis, len(moment))
    held = 0.0 if basis is None else float((basis.T @ moment @ basis).trace())
    wanted = energy * float(moment.trace())
    reached = held + torch.cat([values.new_zeros(1), values.cumsum(0)])
    count = min(int((reached < wanted * (1 - 1e-12)).sum()), int((values > _NONE * moment.trace()).sum()))
    new = vectors[:, :count]
    return new if basis is None else torch.cat([basis, new], dim=1)


def _leading(moment: Tensor, basis: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """The first eigenvectors [d, count] and eigenvalues [count] of C off the basis, largest first."""
    off = moment
    if basis is not None:
        # (1 − M Mᵀ) C (1 − M Mᵀ) = C − M Hᵀ − H Mᵀ, with H = C M − ½ M Mᵀ C M
        inside = moment @ basis
        shared = basis @ (inside - basis @ (basis.T @ inside) / 2).T
        off = moment - shared - shared.T
    values, vectors = torch.linalg.eigh((off + off.T) / 2)
    values, vectors = values.flip(0)[:count].clamp(min=0), vectors.flip(1)[:, :count]
    if basis is not None:
        # rounding lets a little of the basis in again
        vectors = vectors - basis @ (basis.T @ vectors)
        vectors = vectors / vectors.norm(dim=0).clamp(min=1e-6)
    return vectors, values
