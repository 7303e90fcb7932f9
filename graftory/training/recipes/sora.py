"""SoRA: a gate for each rank, of which L1 leaves as many as the task needs (Ding et al. 2023, arXiv:2311.11696).

s B diag(g) A, g from 1. After each step of the optimizer g becomes sign(g) max(|g| - ηλ, 0), the proximal step of
λ|g| with the step's learning rate η (paper, eq. 7). What is kept is the LoRA of the ranks whose gate is not 0, with
the gates in B: it has a rank of its own at each module, and modules with none go. (If all gates are 0, one rank
stays, with B at 0.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftory.adapter import Adapter
from graftory.config import LoraConfig, SoraConfig
from graftory.training.recipes.base import Recipe, Scene, plain

A, B = LoraConfig.parts
_GATE = "/gate"


def sora(scene: Scene) -> Recipe:
    """The recipe."""
    config = scene.config
    assert isinstance(config, SoraConfig)
    device = next(iter(scene.model.weights(scene.name).values())).device
    gates = nn.ParameterDict(
        {_key(path): nn.Parameter(torch.ones(config.rank_of(path), device=device)) for path in config.targets}
    )
    return Recipe(
        stand_ins=partial(_gated, gates),
        undecayed=(_GATE,),
        extra=gates,
        callbacks=(_Shrink(gates, config.sparsity),),
        finish=partial(_kept, gates),
    )


class _Shrink(TrainerCallback):
    """The proximal step behind each step of the optimizer."""

    def __init__(self, gates: nn.ParameterDict, strength: float) -> None:
        self.gates, self.strength = gates, strength

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        del args, state, control
        own = {id(gate) for gate in self.gates.values()}
        for group in more["optimizer"].param_groups:
            for gate in group["params"]:
                if id(gate) in own:
                    shrink_(gate.data, group["lr"] * self.strength)


def shrink_(gate: Tensor, by: float) -> None:
    """g ← sign(g) max(|g| - by, 0)."""
    gate.copy_(gate.sign() * (gate.abs() - by).clamp(min=0))


def _key(path: str) -> str:
    return path.replace(".", "/") + _GATE


def _gated(gates: nn.ParameterDict, live: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights of a step: B diag(g)."""
    return {
        key: value * gates[_key(key.removesuffix(f".{B}"))] if key.endswith(f".{B}") else value
        for key, value in live.items()
    }


def _kept(gates: nn.ParameterDict, adapter: Adapter) -> Adapter:
    return pruned(adapter, {path: gates[_key(path)].detach().cpu() for path in adapter.spec.config.targets})


def pruned(adapter: Adapter, gates: Mapping[str, Tensor]) -> Adapter:
    """The LoRA of the ranks whose gate is not 0; the scales of all modules stay as they are."""
    config = adapter.spec.config
    assert isinstance(config, SoraConfig)
    ranks = {path: int(gate.count_nonzero()) for path, gate in gates.items()}
    left = {path: rank for path, rank in ranks.items() if rank} or {config.targets[0]: 1}
    tensors: dict[str, Tensor] = {}
    for path, rank in left.items():
        gate = gates[path]
        chosen = gate.nonzero()[:, 0] if ranks[path] else torch.arange(rank)
        tensors[f"{path}.{A}"] = adapter.tensors[f"{path}.{A}"][chosen].contiguous()
        tensors[f"{path}.{B}"] = (adapter.tensors[f"{path}.{B}"] * gate)[:, chosen].contiguous()
    usual = max(left.values(), key=list(left.values()).count)
    alphas = {path: config.scale_of(path) * (rank**0.5 if config.rslora else rank) for path, rank in left.items()}
    alpha = next(alphas[path] for path, rank in left.items() if rank == usual)
    kept = replace(
        config,
        targets=tuple(left),
        init_seed=None,
        rank=usual,
        alpha=alpha,
        rank_pattern={path: rank for path, rank in left.items() if rank != usual},
        alpha_pattern={path: value for path, value in alphas.items() if value != alpha},
    )
    return plain(replace(adapter, spec=replace(adapter.spec, config=kept)), LoraConfig, tensors)
