"""An adapter to AdapterHub's files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

from graftory.adapter import Adapter
from graftory.config import BottleneckConfig, LoraConfig
from graftory.errors import UnsupportedAdapterError
from graftory.hub.adapterhub.heads import as_json, write_head
from graftory.hub.adapterhub.names import (
    ACTIVATIONS,
    BOTTLENECK_PARTS,
    CONFIG,
    KINDS,
    LORA_PARTS,
    MODEL_CLASSES,
    WEIGHTS,
    check_architecture,
)
from graftory.hub.codecs import tensors as shared
from graftory.schema import Json

if TYPE_CHECKING:
    from torch import Tensor

_LAYER = re.compile(r"(?:.*\.)?layer\.(\d+)\.(.+)")
_VERSION = "adapters.1.3.0"
_ROLES: Mapping[str, str] = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
}
"""Modules of a layer that AdapterHub puts LoRA on."""


def write(adapter: Adapter, name: str, *, layers: int) -> dict[str, bytes]:
    """The files of an adapter, for `load_adapter` of the library `adapters`.

    Args:
        adapter: A LoRA or bottleneck adapter of BERT, RoBERTa or XLM-R.
        name: What AdapterHub will call it.
        layers: How many layers the base has: those without adapters are told apart by name.

    Raises:
        UnsupportedAdapterError: If AdapterHub's format cannot hold it; the text says why.
    """
    kind = check_architecture(adapter.spec.base.architecture, f"adapter {name!r}")
    # a dot would end the name in the keys of its tensors
    name = name.rpartition("/")[2].replace(".", "_")
    config = adapter.spec.config
    if type(config) is LoraConfig:
        settings, stored = _lora(config, layers), _renamed(adapter.body_tensors(), "loras", name, LORA_PARTS, "")
        width = _lora_width(adapter, config.targets[0])
    elif type(config) is BottleneckConfig:
        end = next(row.end for row in KINDS if row.placement == config.placement)
        width = adapter.tensors[f"{config.targets[0]}.{BottleneckConfig.parts[3]}"].shape[0]
        settings = _bottleneck(config, layers, width)
        stored = _renamed(adapter.body_tensors(), "adapters", name, BOTTLENECK_PARTS, f".{end}")
    else:
        raise UnsupportedAdapterError(
            f"a {config.method} adapter cannot be written for AdapterHub; lora or bottleneck can"
        )
    common: dict[str, Json] = {
        "hidden_size": width,
        "model_class": MODEL_CLASSES[kind],
        "model_name": adapter.spec.base.id,
        "model_type": kind,
        "name": name,
        "version": _VERSION,
    }
    files = {CONFIG: as_json({"config": settings, **common}), WEIGHTS: shared.dump(stored)}
    return {**files, **write_head(adapter, kind, common)}


def _lora_width(adapter: Adapter, path: str) -> int:
    """The width of the residual stream, which all linear layers of a block read, but for the FFN's last, which writes
    it.
    """
    down, up = (adapter.tensors[f"{path}.{part}"] for part in LoraConfig.parts)
    return int(up.shape[0] if path.endswith(".output.dense") else down.shape[1])


def _renamed(
    body: Mapping[str, Tensor], family: str, name: str, parts: Mapping[str, str], end: str
) -> dict[str, Tensor]:
    renamed = {}
    for theirs, ours in parts.items():
        for key, tensor in body.items():
            if key.endswith(f".{ours}"):
                renamed[f"{key.removesuffix(f'.{ours}').removesuffix(end)}.{family}.{name}.{theirs}"] = tensor
    return renamed


def _by_layer(targets: Iterable[str], layers: int) -> tuple[set[str], list[int]]:
    """What sits in each layer that has something, and the layers that have nothing.

    Raises:
        UnsupportedAdapterError: If layers differ, or a target lies in none.
    """
    found: dict[int, set[str]] = {}
    for path in targets:
        matched = _LAYER.fullmatch(path)
        if matched is None or int(matched[1]) >= layers:
            raise UnsupportedAdapterError(
                f"{path} lies in none of the base's {layers} layers; AdapterHub has no such place"
            )
        found.setdefault(int(matched[1]), set()).add(matched[2])
    first = next(iter(found.values()))
    for layer, modules in found.items():
        if modules != first:
            odd = sorted(modules ^ first)[0]
            raise UnsupportedAdapterError(
                f"{odd} has an adapter in some layers, in layer {layer} another set; AdapterHub wants one"
            )
    return first, [layer for layer in range(layers) if layer not in found]


def _lora(config: LoraConfig, layers: int) -> dict[str, Json]:
    modules, without = _by_layer(config.targets, layers)
    odd = sorted(modules - set(_ROLES))
    if odd:
        raise UnsupportedAdapterError(f"AdapterHub has no LoRA on {odd[0]}; it has it on {', '.join(_ROLES)}")
    kinds = {(config.rank_of(path), config.scale_of(path)) for path in config.targets}
    if len(kinds) > 1:
        raise UnsupportedAdapterError(
            "the modules have several ranks or scales, AdapterHub wants one: make one of them with hub merge --rank"
        )
    ((rank, scale),) = kinds
    roles = {_ROLES[module] for module in modules}
    return {
        "alpha": _whole(scale * rank),
        "architecture": "lora",
        "attn_matrices": [role for role in ("q", "k", "v") if role in roles],
        "composition_mode": "add",
        "dropout": config.dropout,
        "init_weights": "lora",
        "intermediate_lora": "intermediate" in roles,
        "leave_out": cast(Json, without),
        "output_lora": "output" in roles,
        "r": rank,
        "selfattn_lora": bool(roles & {"q", "k", "v"}),
        "use_gating": False,
    }


def _bottleneck(config: BottleneckConfig, layers: int, width: int) -> dict[str, Json]:
    row = next(row for row in KINDS if row.placement == config.placement)
    modules, without = _by_layer(config.targets, layers)
    sizes = {config.size_of(path) for path in config.targets}
    if len(sizes) > 1:
        raise UnsupportedAdapterError(f"the sites have the sizes {sorted(sizes)}, AdapterHub wants one")
    (size,) = sizes
    return {
        **row.says,
        "adapter_residual_before_ln": False,
        "cross_adapter": False,
        "dropout": 0.0,
        "init_weights": "bert",
        "inv_adapter": None,
        "inv_adapter_reduction_factor": None,
        "leave_out": cast(Json, without),
        "ln_after": False,
        "ln_before": False,
        "mh_adapter": f"attention.output.{row.end}" in modules,
        "non_linearity": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
        "original_ln_after": True,
        "output_adapter": f"output.{row.end}" in modules,
        "phm_layer": False,
        # they divide and round down
        "reduction_factor": width // size if width % size == 0 else width / (size + 0.5),
        "residual_before_ln": True,
        "scaling": config.scale,
        "use_gating": False,
    }


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value
