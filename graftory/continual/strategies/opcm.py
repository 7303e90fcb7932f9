"""opcm: tasks learnt apart and merged one by one, each in directions that the merged ones do not use."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.config import LoraConfig, option
from graftory.continual.checks import at_least, share
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
    fresh_directions,
    newest_answers,
)
from graftory.training.company import Learnt

_DOWN, _UP = DOWN["lora"], UP["lora"]
_NONE = 1e-9
"""Of the largest singular value: those below it are rounding."""
Factors = tuple[Tensor, Tensor]
"""L [d_out, r] and R [r, d_in] of a matrix L R, fp64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opcm(Strategy):
    """Task t trains a fresh adapter alone: τ_t = s B A at each layer. With M = U Σ Vᵀ what is merged so far:

    1. k: the least number of leading directions with Σ_{i≤k} σ_i ≥ α Σ_i σ_i.
    2. P(τ_t) = Σ_{i,j>k, i≠j} ⟨τ_t, u_i v_jᵀ⟩ u_i v_jᵀ: neither reads nor writes what the first k do.
    3. M ← (λ_{t−1} M + P(τ_t)) / λ_t, with λ_t such that ‖M‖, over all layers, is the mean of ‖τ_1‖, …, ‖τ_t‖.

    M_1 = τ_1, λ_1 = 1. Rows are answered by M with the task's head. M is a LoRA of rank t·r, cut to the leading
    `most` · r directions (before λ_t is taken), so that what is stored does not grow.
    """

    protected: float = option("α, the share of the singular values whose directions are left to earlier tasks", 0.5)
    most: int = option("largest rank of the merged adapter, in ranks of one task's", 4)

    title: ClassVar[str] = "tasks learnt apart, merged by orthogonal projection"
    paper: ClassVar[str] = "Tang et al. 2025, arXiv:2501.09522"
    stores: ClassVar[str] = "head (merged adapter, once)"
    needs: ClassVar[Needs] = Needs(("task", "domain"), methods=("lora",))

    def __post_init__(self) -> None:
        share(protected=self.protected)
        at_least(1, most=self.most)

    def prepare(self, lesson: Lesson) -> Plan:
        """Start from a fresh adapter."""
        return Plan(fresh_directions(lesson), after_newest(lesson.context), lesson.context.run)

    def finish(self, lesson: Lesson, learnt: Learnt) -> Finished:
        """Steps 1 to 3."""
        newest, task = lesson.context.newest(), learnt.adapter
        paths = task.spec.config.targets
        norm = norm_of([factors(task, path) for path in paths])
        if newest is None:
            return Finished(task, _kept(norm, 1.0))
        before = lesson.context.kept.under("opcm").values
        config = task.spec.config
        assert isinstance(config, LoraConfig)
        merged = {
            path: merge(
                factors(newest, path), factors(task, path), before["scale"], self.protected,
                self.most * config.rank_of(path),
            )
            for path in paths
        }  # fmt: skip
        norms = before["norms"] + norm
        scale = norm_of(list(merged.values())) * lesson.number / max(norms, _NONE)
        return Finished(as_lora(task, merged, 1 / max(scale, _NONE)), _kept(norms, scale))

    def answer(self, context: Context, task: str) -> Answer:
        """The merged adapter with the task's head."""
        return newest_answers(context, task)


def merge(merged: Factors, task: Factors, scale: float, protected: float, most: int) -> Factors:
    """λ M + P(τ) at one layer, its leading directions.

    Args:
        merged: M.
        task: τ.
        scale: λ.
        protected: α.
        most: So many directions at most.
    """
    u, sizes, v = singular(merged)
    left, right = projected(task, (u, sizes, v), protected)
    u, sizes, v = singular((torch.cat([scale * u * sizes, left], dim=1), torch.cat([v.T, right])))
    return u[:, :most] * sizes[:most], v[:, :most].T


def projected(task: Factors, merged: tuple[Tensor, Tensor, Tensor], protected: float) -> Factors:
    """P(τ) = (1 − U_k U_kᵀ) τ (1 − V_k V_kᵀ) − Σ_{i>k} u_i (u_iᵀ τ v_i) v_iᵀ.

    Where M has no singular value left, which u belongs to which v is arbitrary, and nothing more is taken away.

    Args:
        task: τ.
        merged: U [d_out, R], σ [R] and V [d_in, R] of M.
        protected: α.
    """
    u, sizes, v = merged
    left, right = task
    k = int((sizes.cumsum(0) < protected * sizes.sum() * (1 - _NONE)).sum()) + 1 if len(sizes) else 0
    along = ((u[:, k:].T @ left) * (right @ v[:, k:]).T).sum(1)
    left = left - u[:, :k] @ (u[:, :k].T @ left)
    right = right - (right @ v[:, :k]) @ v[:, :k].T
    return torch.cat([left, -u[:, k:] * along], dim=1), torch.cat([right, v[:, k:].T])


def singular(factored: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, V of a matrix in factors, without those whose σ is 0."""
    (q, r), (p, s) = torch.linalg.qr(factored[0]), torch.linalg.qr(factored[1].T)
    u, sizes, vh = torch.linalg.svd(r @ s.T)
    used = int((sizes > _NONE * sizes.max()).sum())
    width = min(used, u.shape[1], vh.shape[0])
    return q @ u[:, :width], sizes[:width], p @ vh[:width].T


def factors(adapter: Adapter, path: str) -> Factors:
    """s B and A at one layer."""
    config = adapter.spec.config
    assert isinstance(config, LoraConfig)
    up, down = (adapter.tensors[f"{path}.{part}"].double() for part in (_UP, _DOWN))
    return config.scale_of(path) * up, down


def norm_of(layers: list[Factors]) -> float:
    """The Frobenius norm over all layers: ‖L R‖² = tr(LᵀL R Rᵀ)."""
    squares = [float(((left.T @ left) * (right @ right.T)).sum()) for left, right in layers]
    return math.sqrt(sum(squares))


def as_lora(like: Adapter, layers: dict[str, Factors], scale: float) -> Adapter:
    """An adapter with s = 1 that adds `scale` · L R at each layer; both of its factors have the same share in it."""
    config = like.spec.config
    assert isinstance(config, LoraConfig)
    ranks = {path: max(1, len(right)) for path, (_, right) in layers.items()}
    rank = max(ranks.values())
    odd = {path: number for path, number in ranks.items() if number != rank}
    config = replace(
        config, rank=rank, alpha=float(rank), rslora=False, init_seed=None, rank_pattern=odd,
        alpha_pattern={path: float(number) for path, number in odd.items()},
    )  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for path, (left, right) in layers.items():
        u, sizes, v = singular((left * scale, right))
        missing = ranks[path] - len(sizes)
        up = torch.cat([u * sizes.sqrt(), u.new_zeros(len(u), missing)], dim=1)
        down = torch.cat([(v * sizes.sqrt()).T, v.new_zeros(missing, len(v))])
        tensors |= {f"{path}.{_UP}": up.float().contiguous(), f"{path}.{_DOWN}": down.float().contiguous()}
    return Adapter(replace(like.spec, config=config), {**tensors, **like.head_tensors()})


def _kept(norms: float, scale: float) -> Kept:
    return Kept(values={"norms": norms, "scale": scale}).moved("opcm")
