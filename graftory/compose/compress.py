"""Smaller versions of an adapter: fewer ranks, fewer layers, fewer bits, and what each of them loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from graftory.adapter import TASK_SOURCE, Adapter, Lineage, Metric, Parent, Storage
from graftory.adapters.expansions import as_bottleneck
from graftory.compose.merge.base import Body, body_of
from graftory.compose.merge.kinds import KINDS, delta_at
from graftory.config import BottleneckConfig, LoraConfig
from graftory.config.base import layer_of
from graftory.errors import ConfigError, UnsupportedAdapterError
from graftory.hub.codecs import codec_of
from graftory.schema import Json, encode
from graftory.versions import library_versions

T = TypeVar("T")
_INPUTS = 64
"""Inputs, normal with variance 1, on which outputs of bottlenecks are compared."""
_KEPT = (TASK_SOURCE, "trained_as")
"""What a lineage goes on telling of the training."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What a smaller adapter has lost, as ‖new - old‖ / ‖old‖ over all sites.

    Attributes:
        weights: Of the tensors of the body; None where they are not the same ones.
        update: Of ΔW, for methods that have one without the base.
        outputs: Of what bottlenecks return for normal inputs.
    """

    weights: float | None = None
    update: float | None = None
    outputs: float | None = None


@dataclass(frozen=True, slots=True)
class Compressed:
    """A smaller adapter.

    Attributes:
        adapter: To be kept with `Hub.put`, which packs it.
        decoded: The same as it will be read.
        loss: What it has lost.
        before: Bytes of the original's files.
        after: Bytes of its own.
    """

    adapter: Adapter
    decoded: Adapter
    loss: Loss
    before: int
    after: int

    def recorded(self, metrics: tuple[Metric, ...] = (), before: tuple[Metric, ...] = ()) -> Adapter:
        """The adapter with the loss in its lineage.

        Args:
            metrics: Measured on it.
            before: The same, measured on the original.
        """
        lineage = self.adapter.spec.lineage
        found: dict[str, Json] = {"loss": encode(self.loss), "bytes": {"before": self.before, "after": self.after}}
        if before:
            found["metrics_before"] = encode(before)
        lineage = replace(lineage, parameters={**lineage.parameters, **found})
        return replace(self.adapter, spec=replace(self.adapter.spec, lineage=lineage, metrics=metrics))


def compress(
    adapter: Adapter,
    *,
    storage: Storage = "full",
    rank: int | None = None,
    drop_layers: int = 0,
    parent: Parent | None = None,
) -> Compressed:
    """Make an adapter smaller.

    Args:
        adapter: What to compress.
        storage: How its tensors are written.
        rank: Keep the first so many ranks of a LoRA that was trained for it (`dylora`).
        drop_layers: Take the adapters of the first so many layers away.
        parent: The original in a hub; relation and weight are filled in here.

    Raises:
        ConfigError: If nothing is asked, or a number does not fit.
        UnsupportedAdapterError: If the method cannot be cut or packed so.
    """
    if storage == "full" and rank is None and not drop_layers:
        raise ConfigError("nothing to compress: give a storage (8bit, 1bit, bitdelta), a rank or layers to drop")
    smaller = adapter if rank is None else truncate(adapter, rank)
    smaller = smaller if not drop_layers else without_layers(smaller, drop_layers)
    asked: dict[str, Json] = {"storage": storage, "rank": rank, "drop_layers": drop_layers}
    kept = {key: value for key, value in adapter.spec.lineage.parameters.items() if key in _KEPT}
    parents = () if parent is None else (replace(parent, relation="compressed", weight=None),)
    lineage = Lineage("compress", parents, {**kept, **asked}, libraries=library_versions())
    smaller = replace(smaller, spec=replace(smaller.spec, lineage=lineage, metrics=(), storage=storage))
    codec = codec_of(smaller.spec)
    files = codec.encode(smaller)
    codec.check(files, smaller.spec)
    decoded = Adapter(replace(smaller.spec, storage="full"), codec.decode(files), smaller.sources)
    before = codec_of(adapter.spec).encode(adapter)
    return Compressed(smaller, decoded, loss_of(adapter, decoded), _size(before), _size(files))


def truncate(adapter: Adapter, rank: int) -> Adapter:
    """The first ranks of a LoRA that was trained with DyLoRA: alpha stays, so s = alpha / rank is as it was trained.

    Raises:
        UnsupportedAdapterError: If it was not trained so.
        ConfigError: If it has not so many ranks.
    """
    config, trained = adapter.spec.config, adapter.spec.lineage.parameters.get("trained_as")
    if type(config) is not LoraConfig or not isinstance(trained, Mapping) or trained.get("method") != "dylora":
        raise UnsupportedAdapterError(
            "rank: only a LoRA trained with hub train --method dylora works with its first ranks alone; of another one "
            "hub merge REF --method svd --rank keeps the best"
        )
    if not 1 <= rank <= config.rank:
        raise ConfigError(f"rank: got {rank}, wanted 1 to {config.rank}")
    down = tuple(f"{path}.{LoraConfig.parts[0]}" for path in config.targets)
    up = tuple(f"{path}.{LoraConfig.parts[1]}" for path in config.targets)
    tensors = {
        key: value[:rank].contiguous() if key in down else value[:, :rank].contiguous() if key in up else value
        for key, value in adapter.tensors.items()
    }
    return Adapter(replace(adapter.spec, config=replace(config, rank=rank)), tensors)


def without_layers(adapter: Adapter, count: int) -> Adapter:
    """An adapter without its part in the first layers.

    Raises:
        UnsupportedAdapterError: If it is neither a LoRA nor a bottleneck.
        ConfigError: If nothing would be left.
    """
    config = adapter.spec.config
    if type(config) not in (LoraConfig, BottleneckConfig):
        raise UnsupportedAdapterError(f"drop_layers: takes lora and bottleneck adapters, this is {config.method}")
    layers = sorted({layer_of(path) for path in config.targets})
    if not 1 <= count < len(layers):
        raise ConfigError(f"drop_layers: got {count}, wanted 1 to {len(layers) - 1}, fewer than the layers it is in")
    targets = tuple(path for path in config.targets if layer_of(path) not in layers[:count])
    left = {f"{path}.{part}" for path in targets for part in config.parts}
    tensors = {key: value for key, value in adapter.tensors.items() if key in left or adapter.is_head(key)}
    kept = replace(config, targets=targets)
    if isinstance(kept, LoraConfig):
        kept = replace(
            kept, rank_pattern=_of(kept.rank_pattern, targets), alpha_pattern=_of(kept.alpha_pattern, targets)
        )
    if isinstance(kept, BottleneckConfig):
        kept = replace(kept, size_pattern=_of(kept.size_pattern, targets))
    return Adapter(replace(adapter.spec, config=kept), tensors)


def loss_of(old: Adapter, new: Adapter) -> Loss:
    """What an adapter has lost beside another one of the same method; what is no longer there counts as 0."""
    return Loss(_weights(old, new), _update(old, new), _outputs(old, new))


def _of(pattern: Mapping[str, T], targets: tuple[str, ...]) -> dict[str, T]:
    return {path: value for path, value in pattern.items() if path in targets}


def _size(files: Mapping[str, bytes]) -> int:
    return sum(map(len, files.values()))


def _weights(old: Adapter, new: Adapter) -> float | None:
    before, after = (
        {key: value for key, value in each.body_tensors().items() if value.is_floating_point()} for each in (old, new)
    )
    if {key: value.shape for key, value in before.items()} != {key: value.shape for key, value in after.items()}:
        return None
    return _relative([(after[key].double(), value.double()) for key, value in before.items()])


def _update(old: Adapter, new: Adapter) -> float | None:
    kind = KINDS.get(type(old.spec.config))
    if kind is None or kind.needs_base(old.spec.config):
        return None
    bodies = body_of(old, 0), body_of(new, 1)
    return _relative([_pair(*bodies, path) for path in old.spec.config.targets])


def _pair(old: Body, new: Body, path: str) -> tuple[Tensor, Tensor]:
    before = _dense(old, path)
    return (_dense(new, path) if path in new.config.targets else torch.zeros_like(before)), before


def _dense(body: Body, path: str) -> Tensor:
    delta = delta_at(body, path)
    return delta.bias.double() if delta.bias is not None else delta.double().dense()


def _outputs(old: Adapter, new: Adapter) -> float | None:
    before, after = as_bottleneck(old), as_bottleneck(new)
    config = before.spec.config
    if type(config) is not BottleneckConfig:
        return None
    pairs = []
    for path in config.targets:
        outputs = _returned(before, path)
        still = path in after.spec.config.targets
        pairs.append((_returned(after, path) if still else torch.zeros_like(outputs), outputs))
    return _relative(pairs)


def _returned(adapter: Adapter, path: str) -> Tensor:
    from transformers.activations import ACT2FN  # here, as a LoRA needs nothing of transformers

    config = adapter.spec.config
    assert isinstance(config, BottleneckConfig)
    down, down_bias, up, up_bias = (adapter.tensors[f"{path}.{part}"].double() for part in config.parts)
    inputs = torch.randn(_INPUTS, down.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden = ACT2FN[config.activation](functional.linear(inputs, down, down_bias))
    return config.scale * functional.linear(hidden, up, up_bias)


def _relative(pairs: list[tuple[Tensor, Tensor]]) -> float | None:
    """‖new - old‖ / ‖old‖ of pairs (new, old), all together; None where the old ones are 0."""
    lost = sum(float((new - old).square().sum()) for new, old in pairs)
    whole = sum(float(old.square().sum()) for _, old in pairs)
    return (lost / whole) ** 0.5 if whole else None
