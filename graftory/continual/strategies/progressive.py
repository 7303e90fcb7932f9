"""progressive-prompts: a new soft prompt for every task, in front of all earlier ones, which stay."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from graftory.adapter import Adapter
from graftory.adapters import AdaptedModel
from graftory.adapters.smop import PROMPTS
from graftory.config import SmopConfig
from graftory.continual.strategies.base import Context, Lesson, Needs, Plan, after_newest, start_from
from graftory.continual.strategies.isolated import Isolated
from graftory.errors import ConfigError
from graftory.training import Hooks


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressivePrompts(Isolated):
    """Task t learns P_t [l, d] and its head; the model reads [P_t, …, P_1, x], P_1 to P_{t−1} as they were.

    Rows of task j are answered with [P_j, …, P_1, x], so with the id given BWT = F = 0 exactly; a router can find the
    task. The length grows by l a task. The paper's reparametrisation by a small network is left out.
    """

    title: ClassVar[str] = "a prompt for every task in front of the earlier ones"
    paper: ClassVar[str] = "Razdaibiedina et al. 2023, arXiv:2301.12314"
    stores: ClassVar[str] = "prompts so far, head, centroids"
    needs: ClassVar[Needs] = Needs(("task", "domain", "class"), methods=("smop",))

    def prepare(self, lesson: Lesson) -> Plan:
        """Put a fresh prompt in front of the last step's, which gets no gradients.

        Raises:
            ConfigError: If rows were to be routed among several prompts.
        """
        context, fresh = lesson.context, lesson.context.untrained[lesson.name]
        config = fresh.spec.config
        if not isinstance(config, SmopConfig) or config.prompts != 1:
            raise ConfigError("progressive-prompts: wanted one prompt a task; set options: {prompts: 1, length: ...}")
        start, own = _longer(context, lesson.name, config), config.length

        def hold(adapted: AdaptedModel, step: int) -> None:
            del step
            for weight in adapted.weights(name).values():
                if weight.grad is not None:
                    weight.grad[:, own:] = 0

        name = f"{context.run}-{lesson.name}"
        # without gradients, and without decay, an optimizer changes no bit
        hooks = Hooks(on_gradients=(hold,), undecayed=(PROMPTS,))
        return Plan(start, after_newest(context), name, hooks)


def _longer(context: Context, task: str, config: SmopConfig) -> Adapter:
    """The fresh prompt with the earlier ones behind it, and the task's fresh head."""
    newest = context.newest()
    start = start_from(replace(context, scenario="task"), task, None)
    if newest is None:
        return start
    old = newest.spec.config
    assert isinstance(old, SmopConfig)  # the run has one method
    prompts = {
        key: torch.cat([tensor, newest.tensors[key]], dim=1)
        for key, tensor in start.body_tensors().items()
        if key.endswith(PROMPTS)
    }
    spec = replace(start.spec, config=replace(config, length=config.length + old.length))
    return Adapter(spec, {**start.tensors, **prompts})
