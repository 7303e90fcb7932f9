"""The methods whose bottlenecks are made of other weights, and the plain bottlenecks that they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from graftory.adapter import Adapter
from graftory.adapters.expanded import Expanded
from graftory.adapters.masked import Masked
from graftory.adapters.phm import Factored
from graftory.config import AdapterConfig, BottleneckConfig, CompacterConfig, PropetlConfig

EXPANSIONS: Mapping[type[AdapterConfig], type[Expanded]] = {CompacterConfig: Factored, PropetlConfig: Masked}


def as_bottleneck(adapter: Adapter) -> Adapter:
    """The same adapter with D and U written out, as a plain bottleneck; other adapters as they are."""
    config, kind = adapter.spec.config, EXPANSIONS.get(type(adapter.spec.config))
    if kind is None:
        return adapter
    shared = {part: adapter.tensors[f"{config.targets[0]}.{part}"] for part in kind.shares}
    own = [part for part in config.parts if part not in kind.shares]
    tensors = dict(adapter.head_tensors())
    for path in config.targets:
        made = kind({part: adapter.tensors[f"{path}.{part}"] for part in own}, shared)
        tensors |= {f"{path}.{part}": made[part].contiguous() for part in BottleneckConfig.parts}
    plain = BottleneckConfig(**{field.name: getattr(config, field.name) for field in fields(BottleneckConfig)})
    # adapters of one initialisation may be averaged number by number; these numbers are made of others
    return Adapter(replace(adapter.spec, config=replace(plain, init_seed=None)), tensors)
