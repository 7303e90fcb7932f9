"""SMoP: train short prompts and the router that picks one of them for each row.

    adapter = smop(loaded, task, rows, SmopConfig(prompts=4, length=5))

Choi et al., EMNLP 2023; the formula is in `graftory.adapters.smop`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftory.adapter import Adapter, AdapterSpec, BaseModel, Lineage, Parent
from graftory.adapters import base_of
from graftory.adapters.smop import SMOP, smop_config
from graftory.config import SmopConfig, config_to_json
from graftory.data import TEXT_KINDS, Rows, TaskFile
from graftory.errors import UnsupportedAdapterError
from graftory.settings import SmopSettings
from graftory.training import Hooks, LoadedBase, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

_ROUTER = "smop_router_weight"
"""End of the name of the router's weight in an adapted model."""


def new_smop(
    model: PreTrainedModel,
    config: SmopConfig | None = None,
    *,
    base: BaseModel | None = None,
    head: Adapter | None = None,
) -> Adapter:
    """Untrained prompts: P normal, W orthogonal.

    Args:
        model: The base model, with no adapter attached.
        config: How many prompts of what length, noise, spread, seed.
        base: The description of `model`; taken from it if not given.
        head: An adapter to take task and head from; by default it has none until it is trained.

    Raises:
        UnsupportedAdapterError: If prompts cannot enter this architecture.
    """
    config = smop_config(model, config or SmopConfig())
    generator = torch.Generator().manual_seed(config.init_seed or 0)
    tensors: dict[str, Tensor] = {}
    for path in config.targets:
        initial = SMOP.initial(model, path, config, generator)
        tensors |= {f"{path}.{part}": tensor for part, tensor in initial.items()}
    task = head.spec.task if head else None
    spec = AdapterSpec(base=base or base_of(model), config=config, task=task, lineage=Lineage("compose"))
    return Adapter(spec, {**tensors, **(head.head_tensors() if head else {})})


def smop(
    loaded: LoadedBase,
    task: TaskFile,
    rows: Rows,
    config: SmopConfig | None = None,
    settings: SmopSettings | None = None,
    *,
    name: str = "smop",
    init: Adapter | None = None,
    parent: Parent | None = None,
    output_dir: str | Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Adapter:
    """Train prompts, their router and a fresh head for a task; the base does not change.

    Args:
        loaded: The base model.
        task: The task.
        rows: Its training rows.
        config: How many prompts of what length, noise, spread; ignored but for its noise if `init` is given.
        settings: How to train; by default `SmopSettings()`.
        name: What the progress bar calls it.
        init: A smop adapter to start from, as SPoT does (Vu et al. 2022, arXiv:2110.07904): prompts and router are
            kept, the head too if it was trained for the same labels.
        parent: Where `init` came from.
        output_dir: Folder for checkpoints; a training that was cut off goes on from the last one in it.
        callbacks: Callbacks of transformers' `Trainer`.

    Raises:
        UnsupportedAdapterError: If prompts cannot enter this architecture, or `init` is no smop adapter.
        BaseMismatchError: If `init` was trained on another base.
        ConfigError: If `output_dir` holds the checkpoints of another training.
    """
    settings = settings or SmopSettings()
    config = config or SmopConfig()
    start = new_smop(loaded.model, replace(config, init_seed=settings.seed), base=loaded.base)
    if init is not None:
        start = replace(init, spec=replace(init.spec, config=replace(smop_config_of(init), noise=config.noise)))
    if task.kind in TEXT_KINDS:
        settings = replace(settings, head_learning_rate=None)  # they answer in words
    trained = train(
        loaded,
        task,
        rows,
        start.spec.config,
        settings,
        name=name,
        output_dir=output_dir,
        init=start,
        hooks=Hooks(rates=((_ROUTER, settings.router_learning_rate),)),
        callbacks=callbacks,
    )
    used = config_to_json(start.spec.config)
    shown = {key: used[key] for key in ("prompts", "length", "noise", "spread")}
    made = trained.spec.lineage
    lineage = replace(
        made,
        process="compose",
        parents=(replace(parent, relation="continued"),) if parent else (),
        parameters={**made.parameters, "method": SMOP.name, **shown},
    )
    return replace(trained, spec=replace(trained.spec, lineage=lineage))


def smop_config_of(adapter: Adapter) -> SmopConfig:
    """The configuration of a smop adapter.

    Raises:
        UnsupportedAdapterError: If it is another kind of adapter.
    """
    config = adapter.spec.config
    if not isinstance(config, SmopConfig):
        raise UnsupportedAdapterError(f"got a {config.method} adapter, wanted one that hub compose smop made")
    return config
