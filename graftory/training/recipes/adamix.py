"""AdaMix: several bottlenecks learn, each step through a random choice of them (Wang et al. 2022, arXiv:2205.12410).

At every place are M down-projections and M up-projections. A pass through the model draws one of each at each place.
A batch passes twice, with two draws, and the loss is L₁ + L₂ + ½ w (KL(p₁‖m) + KL(p₂‖m)), m = (p₁ + p₂) / 2, over the
targets (as in the paper's code; for regression the squares of what the outputs differ from their mean). The mean of
the M is kept: one plain bottleneck, at no cost in use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from graftory.adapter import Adapter, TaskKind
from graftory.config import AdamixConfig, BottleneckConfig
from graftory.errors import ConfigError
from graftory.training.encode import IGNORED
from graftory.training.losses import model_inputs, row_losses
from graftory.training.recipes.base import Recipe, Scene, plain
from graftory.training.trainer import StepContext

DOWN, DOWN_BIAS, UP, UP_BIAS = BottleneckConfig.parts
_HALVES = ((DOWN, DOWN_BIAS), (UP, UP_BIAS))
"""What is drawn together."""


def adamix(scene: Scene) -> Recipe:
    """The recipe.

    Raises:
        ConfigError: If the forward runs again in the backward, where it would run through another draw.
    """
    config = scene.config
    assert isinstance(config, AdamixConfig)
    if scene.settings.gradient_checkpointing:
        raise ConfigError("gradient_checkpointing: adamix passes twice with other weights each; leave it out")
    # the parameters themselves: within a step `weights` gives what stands in for them
    live = scene.model.weights(scene.name)
    extra = _others(config, live)
    others: dict[str, Tensor] = dict(extra.items())
    return Recipe(
        stand_ins=partial(_drawn, config, others),
        terms=(partial(_second_pass, scene.kind, config, others, live),),
        extra=extra,
        finish=partial(_kept, config, others),
    )


def _others(config: AdamixConfig, live: Mapping[str, Tensor]) -> nn.ParameterDict:
    """All experts but the first, which is the adapter: D drawn anew, the rest as it starts."""
    generator = torch.Generator().manual_seed(1 + (config.init_seed or 0))
    found = nn.ParameterDict()
    for number in range(1, config.experts):
        for key, value in live.items():
            fresh = value.detach().cpu().clone()
            if key.endswith(DOWN):
                nn.init.kaiming_uniform_(fresh, a=5**0.5, generator=generator)
            found[_key(key, number)] = nn.Parameter(fresh.to(value.device))
    return found


def _key(key: str, number: int) -> str:
    return f"{key}.{number}".replace(".", "/")


def _expert(others: Mapping[str, Tensor], live: Mapping[str, Tensor], key: str, number: int) -> Tensor:
    return others[_key(key, number)] if number else live[key]


def _drawn(config: AdamixConfig, others: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights of one pass."""
    made: dict[str, Tensor] = {}
    for path in config.targets:
        for half in _HALVES:
            number = int(torch.randint(config.experts, ()))
            made |= {f"{path}.{part}": _expert(others, live, f"{path}.{part}", number) for part in half}
    return made


def _second_pass(
    kind: TaskKind, config: AdamixConfig, others: Mapping[str, Tensor], live: Mapping[str, Tensor], context: StepContext
) -> dict[str, Tensor]:
    """L₂ and the disagreement of the two passes."""
    model, name = context.model, context.name
    with model.made(name, _drawn(config, others, live)):
        logits = model(**model_inputs(kind, context.batch)).logits
    first, labels = context.outputs.logits, context.batch["labels"]
    again = row_losses(kind, logits, labels).mean()
    return {"second": again, "consistency": config.consistency * 0.5 * disagreement(kind, first, logits, labels)}


def disagreement(kind: TaskKind, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
    """KL(p₁‖m) + KL(p₂‖m), the mean over all targets; for regression squares."""
    if kind == "regression":
        mean = (first[:, 0] + second[:, 0]) / 2
        return ((first[:, 0] - mean) ** 2 + (second[:, 0] - mean) ** 2).mean()
    if kind == "causal_lm":
        first, second, labels = first[:, :-1], second[:, :-1], labels[:, 1:]
    if kind != "classification":
        first, second = first[labels != IGNORED], second[labels != IGNORED]
    logs = [logits.float().log_softmax(-1) for logits in (first, second)]
    mean = torch.logaddexp(logs[0], logs[1]) - torch.log(torch.tensor(2.0))
    each = [torch.where(log.isinf(), 0.0, log.exp() * (log - mean)).sum(-1).mean() for log in logs]
    return each[0] + each[1]


def _kept(config: AdamixConfig, others: Mapping[str, Tensor], adapter: Adapter) -> Adapter:
    """The mean of all experts."""
    live = adapter.body_tensors()
    tensors = {
        key: torch.stack([_expert(others, live, key, number).detach().cpu() for number in range(config.experts)]).mean(
            0
        )
        for key in live
    }
    made = plain(adapter, BottleneckConfig, tensors)
    return replace(made, spec=replace(made.spec, config=replace(made.spec.config, init_seed=None)))
