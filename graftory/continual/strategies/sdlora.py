"""sd-lora: the directions of earlier adapters stay, their magnitudes go on learning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftory.adapter import Adapter
from graftory.adapters import AdaptedModel
from graftory.continual.stack import DOWN, UP, blocks, stacked, units_of
from graftory.continual.strategies.added import SUM, Added, both
from graftory.continual.strategies.base import Finished, Lesson, Needs, Plan
from graftory.training.company import Learnt

_DOWN, _UP = DOWN["lora"], UP["lora"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SdLora(Added):
    """At each layer h = W x + s (Σ_{i<t} α_i · B_i A_i / (‖B_i‖_F ‖A_i‖_F) + B_t A_t) x; A_i, B_i stay for i < t, all
    α_i learn, from the magnitude ‖B_i‖_F ‖A_i‖_F that the direction has, one at each layer.

    The newest adapter needs no α: B_t holds its magnitude. Rows are answered by the sum with the task's head.
    """

    title: ClassVar[str] = "directions stay, magnitudes learn"
    paper: ClassVar[str] = "Wu et al. 2025, arXiv:2501.13198"
    stores: ClassVar[str] = "adapter, head"
    needs: ClassVar[Needs] = Needs(("task", "domain"), methods=("lora",))

    def prepare(self, lesson: Lesson) -> Plan:
        """Let the magnitudes learn, from the second task on."""
        plan, newest = Added.prepare(self, lesson), lesson.context.newest()
        if newest is None:
            return plan
        units = {path: units_of(plan.start.spec.config, path) for path in newest.spec.config.targets}
        parts = {path: decoupled(newest, path, units[path]) for path in units}
        magnitudes = nn.ParameterDict({_key(path): nn.Parameter(part[0].clone()) for path, part in parts.items()})

        @contextmanager
        def route(adapted: AdaptedModel, name: str) -> Iterator[None]:
            made = {}
            for path, (_, directions) in parts.items():
                alpha, down = magnitudes[_key(path)], newest.tensors[f"{path}.{_DOWN}"]
                made[f"{path}.{_DOWN}"] = down.to(alpha.device)
                made[f"{path}.{_UP}"] = scaled(alpha, directions)
            with adapted.made(SUM, made), both(adapted, name):
                yield

        # decay would be forgetting: nothing pulls an old magnitude back
        hooks = replace(plan.hooks, route=route, extra=magnitudes, undecayed=tuple(magnitudes))
        return replace(plan, hooks=hooks)

    def finish(self, lesson: Lesson, learnt: Learnt) -> Finished:
        """Put the magnitudes into the B of the earlier adapters, and add the new one."""
        newest = lesson.context.newest()
        if newest is None:
            return Finished(learnt.adapter)
        now: dict[str, Tensor] = {}
        for path in newest.spec.config.targets:
            _, directions = decoupled(newest, path, units_of(learnt.adapter.spec.config, path))
            now[f"{path}.{_UP}"] = scaled(learnt.extra[_key(path)], directions)
        return Finished(stacked(Adapter(newest.spec, {**newest.tensors, **now}), learnt.adapter))


def decoupled(adapter: Adapter, path: str, units: int) -> tuple[Tensor, list[Tensor]]:
    """The magnitudes α_i = ‖B_i‖_F ‖A_i‖_F at one site, [adapters], and B_i / α_i of each: with A_i, its direction."""
    parts = blocks(adapter, path, units)
    magnitudes = torch.stack([up.norm() * down.norm() for down, up in parts])
    return magnitudes, [up / size.clamp(min=1e-12) for size, (_, up) in zip(magnitudes, parts, strict=True)]


def scaled(magnitudes: Tensor, directions: list[Tensor]) -> Tensor:
    """The B of all adapters side by side, [d_out, Σ r]: α_i B_i / (‖B_i‖ ‖A_i‖)."""
    parts = [size * up.to(size.device) for size, up in zip(magnitudes, directions, strict=True)]
    return torch.cat(parts, dim=1)


def _key(path: str) -> str:
    return path.replace(".", "/")
