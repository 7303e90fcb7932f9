"""AdapterHub's files to an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from statistics import mode
from typing import TYPE_CHECKING

from graftory.adapter import Adapter, AdapterSpec, BaseModel, Lineage, TaskInfo
from graftory.config import AdapterConfig, BottleneckConfig, LoraConfig
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from graftory.hub import strict_json
from graftory.hub.adapterhub.heads import read_head
from graftory.hub.adapterhub.names import (
    BOTTLENECK_PARTS,
    CONFIG,
    HEAD_CONFIG,
    HEAD_WEIGHTS,
    LORA_PARTS,
    WEIGHTS,
    check_architecture,
)
from graftory.hub.adapterhub.settings import (
    Settings,
    activation_of,
    bottleneck_kind,
    check_lora,
    is_lora,
    number,
    section,
)
from graftory.hub.codecs import tensors as shared
from graftory.hub.safetensors_header import Bytes
from graftory.schema import Json

if TYPE_CHECKING:
    from torch import Tensor

_MAX_TEXT = 1024
_KEY = re.compile(r"(.+)\.(adapters|loras)\.([^.]+)\.(.+)")


def file_names_in(found: Set[str]) -> tuple[str, ...]:
    """The files to read of a folder with these, if an adapter of AdapterHub is in it; empty if not."""
    if not {CONFIG, WEIGHTS} <= found:
        return ()
    return tuple(name for name in (CONFIG, WEIGHTS, HEAD_CONFIG, HEAD_WEIGHTS) if name in found)


def read(files: Mapping[str, Bytes], name: str) -> Adapter:
    """The adapter, under our names.

    Args:
        files: The bytes by file name.
        name: Name for the task: the adapter's.

    Raises:
        CorruptAdapterError: If a file breaks its format, or they disagree.
        UnsupportedAdapterError: If it uses something graftory does not do; it is named.
    """
    data = section(strict_json.loads(bytes(files[CONFIG]), CONFIG), CONFIG)
    kind = check_architecture(data.get("model_type"), CONFIG)
    config = section(data.get("config"), f"{CONFIG}: config")
    shared.read_floats(files[WEIGHTS], WEIGHTS)
    stored = shared.load(files[WEIGHTS])
    theirs = str(data.get("name"))
    if is_lora(config):
        body = _renamed(stored, "loras", theirs, LORA_PARTS, "")
        made: AdapterConfig = _lora(config, body)
    else:
        body = _renamed(stored, "adapters", theirs, BOTTLENECK_PARTS, f".{bottleneck_kind(config).end}")
        made = _bottleneck(config, body, versioned="version" in data)
    task, head = _head(files, kind, name)
    version = _text(data.get("version")).rpartition("adapters.")[2]
    spec = AdapterSpec(
        base=BaseModel(_text(data.get("model_name")) or "unknown", architecture=kind),
        config=made,
        task=task,
        lineage=Lineage(process="import", libraries={"adapters": version} if version else {}),
    )
    return Adapter(spec, {**body, **head})


def _text(said: Json) -> str:
    """A text, if it can be a name or version: on one line, and no address that something might fetch; else empty."""
    fits = isinstance(said, str) and said.isprintable() and "://" not in said and len(said) <= _MAX_TEXT
    return str(said) if fits else ""


def _renamed(
    stored: Mapping[str, Tensor], family: str, name: str, parts: Mapping[str, str], end: str
) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in stored.items():
        found = _KEY.fullmatch(key)
        if not found or found[2] != family or found[3] != name or found[4] not in parts:
            wanted = f"<module>.{family}.<name>.{next(iter(parts))}, with the configuration's name"
            raise UnsupportedAdapterError(f"{WEIGHTS}: tensor {key!r:.200} is not understood; wanted {wanted}")
        if tensor.dim() == 0:
            raise CorruptAdapterError(f"{WEIGHTS}: tensor {key!r:.200} is one number; save the adapter again")
        renamed[f"{found[1]}{end}.{parts[found[4]]}"] = tensor
    return renamed


def _paths(body: Mapping[str, Tensor], part: str) -> tuple[str, ...]:
    paths = sorted(key.removesuffix(f".{part}") for key in body if key.endswith(f".{part}"))
    if not paths:
        raise CorruptAdapterError(f"{WEIGHTS}: no tensor ends in {part}; save the adapter again")
    return tuple(paths)


def _lora(config: Settings, body: Mapping[str, Tensor]) -> LoraConfig:
    check_lora(config)
    down = LoraConfig.parts[0]
    paths = _paths(body, down)
    rank = int(number(config, "r", 8, lambda value: value >= 1 and value == int(value)))
    ranks = {path: body[f"{path}.{down}"].shape[0] for path in paths}
    if set(ranks.values()) != {rank}:
        raise CorruptAdapterError(f"{CONFIG}: r is {rank}, the tensors have {sorted(set(ranks.values()))}; save both")
    return LoraConfig(
        targets=paths,
        init_seed=None,
        rank=rank,
        alpha=number(config, "alpha", 8, lambda _: True),
        dropout=number(config, "dropout", 0.0, lambda value: 0 <= value < 1),
    )


def _bottleneck(config: Settings, body: Mapping[str, Tensor], *, versioned: bool) -> BottleneckConfig:
    bias = BottleneckConfig.parts[1]
    paths = _paths(body, bias)
    sizes = {path: body[f"{path}.{bias}"].shape[0] for path in paths}
    usual = mode(sizes.values())
    return BottleneckConfig(
        targets=paths,
        init_seed=None,
        placement=bottleneck_kind(config).placement,
        size=usual,
        size_pattern={path: size for path, size in sizes.items() if size != usual},
        activation=activation_of(config, versioned=versioned),
        scale=number(config, "scaling", 1.0, lambda _: True),
    )


def _head(files: Mapping[str, Bytes], kind: str, name: str) -> tuple[TaskInfo | None, dict[str, Tensor]]:
    if (HEAD_CONFIG in files) != (HEAD_WEIGHTS in files):
        raise CorruptAdapterError(
            f"only one of {HEAD_CONFIG} and {HEAD_WEIGHTS} is there; copy both, or remove it to add the adapter alone"
        )
    if HEAD_CONFIG not in files:
        return None, {}
    return read_head(files, kind, name)
