"""AdapterFusion: train attention over the outputs of adapters that stay as they are.

    sources = [hub.get(ref) for ref in ("trec", "sms")]
    fused = fuse(loaded, task, rows, sources, name="fused", parents=[...])

Pfeiffer et al. 2021, arXiv:2005.00247: in stage 1 each adapter was trained alone; in stage 2, here, base and adapters
are frozen, and Q, K, V and a fresh head learn, with 0.01 sum |V - I|^2 added to the loss and no weight decay on V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftory.adapter import Adapter, AdapterSpec, BaseModel, Lineage, Parent
from graftory.adapters import base_of
from graftory.adapters.fusion import FUSION, fused_config
from graftory.config import FusionConfig, FusionPlace, config_to_json
from graftory.data import Rows, TaskFile
from graftory.errors import BaseMismatchError, UnsupportedAdapterError
from graftory.settings import FusionSettings, TrainSettings
from graftory.training import Hooks, LoadedBase, LossTerm, StepContext, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

_VALUE = "value.weight"
_UNDECAYED = "value_weight"


def new_fusion(
    model: PreTrainedModel,
    sources: Sequence[Adapter],
    config: FusionConfig | None = None,
    *,
    base: BaseModel | None = None,
    head: Adapter | None = None,
    parents: Sequence[Parent] = (),
) -> Adapter:
    """An untrained fusion: nearly the mean of its sources, as Q and K start small and V starts as the identity.

    Args:
        model: The base model, with no adapter attached.
        sources: LoRA and bottleneck adapters of that base, in any mixture of sizes and placements.
        config: Dropout, regularisation, seed, and targets if not all places of the sources are to be fused.
        base: The description of `model`; taken from it if not given.
        head: An adapter to take task and head from; by default the fusion has none until it is trained.
        parents: Where the sources came from, one each in order (the hub knows the digests).

    Raises:
        UnsupportedAdapterError: If a source cannot be fused, there is none, or a target fits nothing.
        BaseMismatchError: If a source was trained on another base.
    """
    base = base or base_of(model)
    for number, source in enumerate(sources):
        _check_base(number, source, base)
    if parents and len(parents) != len(sources):
        raise UnsupportedAdapterError(f"got {len(parents)} parents for {len(sources)} adapters, wanted one each")
    config = fused_config(model, sources, config or FusionConfig())
    generator = torch.Generator().manual_seed(config.init_seed or 0)
    tensors: dict[str, Tensor] = {}
    for path in config.targets:
        initial = FUSION.initial(model, path, config, generator)
        tensors |= {f"{path}.{part}": tensor for part, tensor in initial.items()}
    lineage = Lineage("compose", tuple(replace(parent, relation="composed") for parent in parents))
    task = head.spec.task if head else None
    spec = AdapterSpec(base=base, config=config, task=task, lineage=lineage)
    return Adapter(spec, {**tensors, **(head.head_tensors() if head else {})}, tuple(sources))


def fuse(
    loaded: LoadedBase,
    task: TaskFile,
    rows: Rows,
    sources: Sequence[Adapter],
    config: FusionConfig | None = None,
    settings: TrainSettings | None = None,
    *,
    name: str = "fusion",
    parents: Sequence[Parent] = (),
    output_dir: str | Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Adapter:
    """Train a fusion of adapters for a task; neither base nor adapters change.

    Args:
        loaded: The base model.
        task: The task.
        rows: Its training rows.
        sources: The adapters, in order.
        config: As in `new_fusion`.
        settings: How to train; by default `FusionSettings()`.
        name: What the progress bar calls it.
        parents: Where the sources came from, one each in order.
        output_dir: Folder for checkpoints; a training that was cut off goes on from the last one in it.
        callbacks: Callbacks of transformers' `Trainer`.

    Returns:
        The fusion, with its sources and lineage.

    Raises:
        UnsupportedAdapterError: As in `new_fusion`.
        BaseMismatchError: If a source was trained on another base.
        ConfigError: If `output_dir` holds the checkpoints of another training.
    """
    settings = settings or FusionSettings()
    config = replace(config or FusionConfig(), init_seed=settings.seed)
    start = new_fusion(loaded.model, sources, config, base=loaded.base, parents=parents)
    hooks = Hooks(
        loss_terms=(identity_penalty(name, config.regularisation),) if config.regularisation else (),
        undecayed=(_UNDECAYED,),
    )
    trained = train(
        loaded,
        task,
        rows,
        start.spec.config,
        settings,
        name=name,
        output_dir=output_dir,
        init=start,
        hooks=hooks,
        callbacks=callbacks,
    )
    return _with_origin(trained, start)


def identity_penalty(name: str, factor: float) -> LossTerm:
    """The paper's regulariser, factor x sum over all places of |V - I|^2 (Frobenius), as a term of the loss.

    Args:
        name: The attached fusion.
        factor: The paper's is 0.01.
    """

    def term(context: StepContext) -> Mapping[str, Tensor]:
        values = [w for key, w in context.model.weights(name).items() if key.endswith(_VALUE)]
        distances = [(value - torch.eye(len(value), device=value.device)).square().sum() for value in values]
        return {"identity": factor * torch.stack(distances).sum()}

    return term


def without(fusion: Adapter, source: int) -> Adapter:
    """A fusion with one of its sources left out. Q, K and V stay: they do not depend on which adapters there are.

    Args:
        fusion: A fusion, with its sources.
        source: Which one, by its position among the sources.

    Raises:
        UnsupportedAdapterError: If it is no fusion, or has no such source, or no other.
    """
    config = fusion.spec.config
    if not isinstance(config, FusionConfig):
        raise UnsupportedAdapterError(f"got a {config.method} adapter, wanted a fusion")
    if not 0 <= source < config.sources or config.sources == 1:
        raise UnsupportedAdapterError(f"got source {source} of {config.sources}, wanted one of several, counted from 0")
    left = [place for place in (_place_without(place, source) for place in config.places) if place is not None]
    targets = tuple(path for path in config.targets if any(place.path == path for place in left))
    fewer = replace(config, places=tuple(left), targets=targets, sources=config.sources - 1)
    kept = {*fewer.tensor_shapes(), *fusion.head_tensors()}
    lineage = fusion.spec.lineage
    composed = [parent for parent in lineage.parents if parent.relation == "composed"]
    parents = tuple(parent for parent in lineage.parents if source >= len(composed) or parent is not composed[source])
    spec = replace(fusion.spec, config=fewer, lineage=replace(lineage, parents=parents), metrics=())
    sources = fusion.sources[:source] + fusion.sources[source + 1 :]
    return Adapter(spec, {key: value for key, value in fusion.tensors.items() if key in kept}, sources)


def _place_without(place: FusionPlace, source: int) -> FusionPlace | None:
    numbers = tuple(number - (number > source) for number in place.sources if number != source)
    return replace(place, sources=numbers) if numbers else None


def _check_base(number: int, source: Adapter, base: BaseModel) -> None:
    theirs = source.spec.base
    for wanted, got in ((theirs.config_hash, base.config_hash), (theirs.weights_hash, base.weights_hash)):
        if wanted is not None and got is not None and wanted != got:
            raise BaseMismatchError(
                f"source {number + 1} was trained on {theirs.id} ({wanted[:15]}…), this base is {base.id} "
                f"({got[:15]}…); fuse adapters of one base"
            )


def _with_origin(trained: Adapter, start: Adapter) -> Adapter:
    """The trained fusion with its parents, and with how it was configured in its lineage."""
    configured = {
        key: value for key, value in config_to_json(trained.spec.config).items() if key in ("dropout", "regularisation")
    }
    made = trained.spec.lineage
    lineage = replace(
        made,
        process="compose",
        parents=start.spec.lineage.parents,
        parameters={**made.parameters, "method": "fusion", **configured},
    )
    return replace(trained, spec=replace(trained.spec, lineage=lineage))
