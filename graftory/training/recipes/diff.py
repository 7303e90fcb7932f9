"""Diff pruning: every weight may change, and a penalty and the size of the change say which do (Guo et al. 2021,
arXiv:2012.07463).

δ = z ⊙ w for each weight of the targets, w from 0, z hard-concrete gates (`gates`) that are drawn anew in each step;
with `grouped` z is the product of a gate of its own and one of its matrix (the paper's structured diff pruning). The
loss gets λ times the expected number of weights that change, Σ P(z > 0), for a matrix P(z_matrix > 0) Σ P(z > 0).

Then, for the last `fixed` part of the steps, the `keep` largest |δ| of all targets together are what learns, and
nothing else changes: no gate is drawn. What is kept is these positions and values. Until then w learns as in full
fine-tuning, at `first_rate`; the few that are left take the training's own rate, as the head does: δ = c w with
c = rate / `first_rate`, and the optimizer starts anew. While it learns it takes what full fine-tuning of the targets
takes, twice: w and log α, each with the optimizer's moments.

The authors' code (github.com/dguo98/DiffPruning) has gates from −1.5 to 1.5, log α from 5 at a rate of 0.1 and
λ = 1.25e-7, as here; it adds the penalties of gates and matrices up rather than multiplying their chances, draws the
same u in every step (it sets the seed), changes embeddings, norms and biases too, clips gradients of w and α apart, and
makes trainings of their own of the phases, the last at five times the first's rate.
"""

# ruff: noqa: ARG002 - the signature is that of transformers

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftory.adapter import Adapter
from graftory.adapters.architectures import linear_widths, module_at
from graftory.config import DiffConfig, SparsePlace, SparseUpdateConfig
from graftory.training.recipes.adalora import steps_of
from graftory.training.recipes.base import Recipe, Scene, plain
from graftory.training.recipes.gates import HardConcrete
from graftory.training.trainer import StepContext

INDEX, VALUE = SparseUpdateConfig.parts[:2]
_GATE, _GROUP = "/gate", "/group/gate"
_SURE = 1e4
"""|log α| of a gate that is open, or closed, whatever is drawn. So that what is settled is in every checkpoint."""


def diff(scene: Scene) -> Recipe:
    """The recipe."""
    config = scene.config
    assert isinstance(config, DiffConfig)
    if not config.sparse:
        scene.exchange(_everywhere(scene, config))
    weights = scene.model.weights(scene.name)
    paths = tuple(key.removesuffix(f".{VALUE}") for key in weights)
    device = next(iter(weights.values())).device
    start = partial(torch.full, fill_value=config.gate_start, device=device)
    log_alphas = {path + _GATE: start(weights[f"{path}.{VALUE}"].shape) for path in paths}
    if config.grouped:
        log_alphas |= {path + _GROUP: start((1,)) for path in paths}
    extra = nn.ParameterDict({_key(name): nn.Parameter(value) for name, value in log_alphas.items()})
    gates = Gates(config, paths, extra, scene.settings.learning_rate / config.first_rate)
    steps = steps_of(scene.settings, len(scene.examples))
    return Recipe(
        stand_ins=gates.gated,
        terms=(gates.penalty,),
        undecayed=(_GATE,),
        rates=((_GATE, config.gate_rate), (f".{VALUE}", config.first_rate)),
        extra=extra,
        callbacks=(_Settle(gates, weights, steps - round(config.fixed * steps)),),
        finish=partial(_kept, gates),
    )


@dataclass(frozen=True, slots=True)
class Gates:
    """The gates of all weights, which learn."""

    config: DiffConfig
    paths: tuple[str, ...]
    log_alphas: nn.ParameterDict
    pace: float = 1.0
    """c: once it is settled which weights change, they are so many times what learns."""

    @property
    def distribution(self) -> HardConcrete:
        """Of every gate."""
        return HardConcrete(self.config.temperature, self.config.stretch_low, self.config.stretch_high)

    def of(self, path: str) -> list[Tensor]:
        """log α of the weights of one module, [n], and of its matrix, [1]."""
        names = (path + _GATE, path + _GROUP)[: 1 + self.config.grouped]
        return [self.log_alphas[_key(name)] for name in names]

    def gated(self, live: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The weights of a step: z ⊙ w, or c w where gates are open for good."""
        draw = self.distribution.usual if self.settled else self.distribution.draw
        made = {key: value * self.pace for key, value in live.items()} if self.settled else dict(live)
        for path in self.paths:
            for log_alpha in self.of(path):
                made[f"{path}.{VALUE}"] = made[f"{path}.{VALUE}"] * draw(log_alpha)
        return made

    def expected(self) -> Tensor:
        """How many weights change, on average."""
        chance = self.distribution.chance
        sums = []
        for path in self.paths:
            own, *group = (chance(log_alpha) for log_alpha in self.of(path))
            sums.append(own.sum() * group[0].squeeze(0) if group else own.sum())
        return torch.stack(sums).sum()

    def penalty(self, context: StepContext) -> Mapping[str, Tensor]:
        """λ times that."""
        del context
        return {"l0": self.config.penalty * self.expected()}

    @property
    def settled(self) -> bool:
        """Whether it is, which weights change."""
        return bool((self.of(self.paths[0])[0].detach().abs() > _SURE / 2).all())

    @torch.no_grad()
    def settle_(self, live: Mapping[str, Tensor]) -> None:
        """Open the gates of the largest |δ| for good, and close all others. `live` becomes δ / c."""
        deltas = []
        for path in self.paths:
            weight = live[f"{path}.{VALUE}"]
            for log_alpha in self.of(path):
                weight.mul_(self.distribution.usual(log_alpha.to(weight)))
            deltas.append(weight)
        for path, weight, mask in zip(self.paths, deltas, largest(deltas, self.config.keep), strict=True):
            own, *group = self.of(path)
            own.copy_(torch.where(mask, _SURE, -_SURE))
            weight.mul_(mask).div_(self.pace)
            for log_alpha in group:
                log_alpha.fill_(_SURE)


def largest(deltas: list[Tensor], keep: float) -> list[Tensor]:
    """Which numbers are the `keep` largest by magnitude, of all vectors together; exactly so many, and at least one."""
    flat = torch.cat([delta.detach().abs() for delta in deltas])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.topk(max(1, round(keep * len(flat)))).indices] = True
    return list(chosen.split([len(delta) for delta in deltas]))


class _Settle(TrainerCallback):
    """Ends the drawing of gates."""

    def __init__(self, gates: Gates, live: Mapping[str, Tensor], step: int) -> None:
        self.gates, self.live, self.step = gates, live, step

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Before the first of the last steps; what the optimizer knows of the weights is of another pace."""
        if state.global_step >= self.step and not self.gates.settled:
            self.gates.settle_(self.live)
            for weight in self.live.values():
                more["optimizer"].state.pop(weight, None)


def _key(name: str) -> str:
    return name.replace(".", "/")


def _everywhere(scene: Scene, config: DiffConfig) -> Adapter:
    """The fresh adapter with an entry for every weight of its targets."""
    adapter = scene.model.extract(scene.name)
    places, tensors = [], {}
    for path in config.targets:
        inputs, outputs = linear_widths(module_at(scene.model.model, path)[1])
        count = inputs * outputs
        places.append(SparsePlace(path=path, count=count, inputs=inputs, outputs=outputs))
        tensors[f"{path}.{INDEX}"] = torch.arange(count, dtype=torch.int32)
        tensors[f"{path}.{VALUE}"] = torch.zeros(count)
    grown = replace(adapter.spec, config=replace(config, sparse=tuple(places)))
    return Adapter(grown, {**tensors, **adapter.head_tensors()})


def _kept(gates: Gates, adapter: Adapter) -> Adapter:
    """The entries whose gate is open, c times what has learnt; modules with none go."""
    config = adapter.spec.config
    assert isinstance(config, DiffConfig)
    values = {f"{place.path}.{VALUE}": adapter.tensors[f"{place.path}.{VALUE}"].clone() for place in config.sparse}
    if not gates.settled:
        gates.settle_(values)
    places, tensors = [], {}
    for place in config.sparse:
        chosen = gates.of(place.path)[0].detach().cpu() > 0
        if bool(chosen.any()):
            places.append(replace(place, count=int(chosen.sum())))
            tensors[f"{place.path}.{INDEX}"] = adapter.tensors[f"{place.path}.{INDEX}"][chosen]
            tensors[f"{place.path}.{VALUE}"] = values[f"{place.path}.{VALUE}"][chosen] * gates.pace
    left = replace(config, targets=tuple(place.path for place in places), sparse=tuple(places), init_seed=None)
    return plain(replace(adapter, spec=replace(adapter.spec, config=left)), SparseUpdateConfig, tensors)
