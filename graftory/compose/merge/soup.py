"""soup: the mean of raw parameters, for adapters that started from the same tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from graftory.compose.merge.base import Body, MergeMethod, MergeParameters
from graftory.errors import MergeError

_ADVICE = "merge with 'linear' instead, which works on the updates and needs no common start"
_FREE = {"dropout", "init_seed", "targets"}
"""Fields that need not be equal here: dropout acts only in training, the other two have checks of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoupParameters(MergeParameters):
    """`soup` has no parameters beside the weights."""


def soup(bodies: Sequence[Body], weights: Sequence[float], parameters: SoupParameters) -> Body:  # noqa: ARG001
    """θ = Σ w_t θ_t / Σ w_t over all parameters (AdapterSoup, Chronopoulou et al. 2023, arXiv:2302.07027).

    The mean of factors is not the mean of updates: it makes sense only near one starting point, so
    anything but a common initialisation, configuration and set of targets is refused.

    Raises:
        MergeError: If the adapters do not share them, or the weights sum to 0 or less.
    """
    total = sum(weights)
    if total <= 0:
        raise MergeError(f"soup: the weights sum to {total:g}, wanted more than 0, as it is a weighted mean")
    if len(bodies) > 1:
        _check_common_start(bodies)
    # in float64, so that the soup of equal adapters is that adapter bit for bit
    tensors = {
        key: torch.stack(
            [body.tensors[key].double() * (weight / total) for body, weight in zip(bodies, weights, strict=True)]
        )
        .sum(0)
        .float()
        for key in bodies[0].tensors
    }
    return Body("the merged adapter", bodies[0].config, tensors)


def _check_common_start(bodies: Sequence[Body]) -> None:
    seeds = [body.config.init_seed for body in bodies]
    if None in seeds:
        raise MergeError(f"soup: the initialisation of {bodies[seeds.index(None)].name} is unknown; {_ADVICE}")
    if len(set(seeds)) > 1:
        raise MergeError(f"soup: the adapters started from different seeds {seeds}; {_ADVICE}")
    first = bodies[0]
    for body in bodies[1:]:
        for field in fields(first.config):
            mine, its = getattr(first.config, field.name), getattr(body.config, field.name)
            if field.name not in _FREE and mine != its:
                raise MergeError(
                    f"soup: {first.name} and {body.name} differ in {field.name} ({mine}, {its}); {_ADVICE}"
                )
        if set(first.config.targets) != set(body.config.targets):
            raise MergeError(f"soup: {first.name} and {body.name} have different targets; {_ADVICE}")
        if {key: t.shape for key, t in first.tensors.items()} != {key: t.shape for key, t in body.tensors.items()}:
            raise MergeError(f"soup: {first.name} and {body.name} have tensors of different shapes; {_ADVICE}")


SOUP = MergeMethod(
    name="soup",
    title="Soup (mean of parameters)",
    paper="https://arxiv.org/abs/2302.07027",
    space="factor",
    accepts=("lora", "bottleneck"),
    params=SoupParameters,
    default_weight=lambda n: 1.0 / n,
    fn=soup,
)
