"""Classification heads of AdapterHub, as heads of transformers' own models and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from graftory.adapter import Adapter, TaskInfo
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from graftory.hub import strict_json
from graftory.hub.adapterhub.names import HEAD_CONFIG, HEAD_WEIGHTS, HEADS, HeadKind
from graftory.hub.adapterhub.settings import section
from graftory.hub.codecs import tensors as shared
from graftory.hub.safetensors_header import Bytes
from graftory.schema import Json

if TYPE_CHECKING:
    from torch import Tensor

_WITHOUT = f"remove {HEAD_CONFIG} and {HEAD_WEIGHTS} to add the adapter without its head"


def read_head(files: Mapping[str, Bytes], kind: str, name: str) -> tuple[TaskInfo, dict[str, Tensor]]:
    """The task that a head is for, and its tensors under our names.

    Raises:
        CorruptAdapterError: If the files break their format, or disagree.
        UnsupportedAdapterError: If transformers' own model has no such head.
    """
    data = section(strict_json.loads(bytes(files[HEAD_CONFIG]), HEAD_CONFIG), HEAD_CONFIG)
    config = section(data.get("config"), f"{HEAD_CONFIG}: config")
    row = _row(config, kind)
    shared.read_floats(files[HEAD_WEIGHTS], HEAD_WEIGHTS)
    stored = shared.load(files[HEAD_WEIGHTS])
    start = f"heads.{data.get('name')}."
    ours = {
        f"{start}{number}.{part}": f"{path}.{part}"
        for number, path in row.layers.items()
        for part in ("weight", "bias")
    }
    if set(stored) != set(ours):
        odd = sorted(set(stored) ^ set(ours))[0]
        raise CorruptAdapterError(f"{HEAD_WEIGHTS}: tensor {odd!r:.200} is too many or missing; {_WITHOUT}")
    labels = _labels(config)
    short = name.rpartition("/")[2]
    task = TaskInfo(short, "regression" if len(labels) == 1 else "classification", head=row.head)
    if len(labels) > 1:
        task = TaskInfo(short, "classification", labels=labels, head=row.head)
    return task, {ours[key]: tensor for key, tensor in stored.items()}


def _row(config: Mapping[str, Json], kind: str) -> HeadKind:
    for key, wanted in (("head_type", "classification"), ("bias", True), ("activation_function", "tanh")):
        if config.get(key, wanted) != wanted:
            raise UnsupportedAdapterError(f"{HEAD_CONFIG}: {key} is {config[key]!r:.80}, wanted {wanted!r}; {_WITHOUT}")
    asked = config.get("layers"), config.get("use_pooler", False)
    for row in HEADS:
        if kind in row.model_types and (len(row.layers), row.pooled) == asked:
            return row
    raise UnsupportedAdapterError(
        f"{HEAD_CONFIG}: a head of layers={asked[0]!r:.20}, use_pooler={asked[1]!r:.20} is none that transformers' own "
        f"{kind} has; {_WITHOUT}"
    )


def _labels(config: Mapping[str, Json]) -> tuple[str, ...]:
    count, named = config.get("num_labels"), config.get("label2id")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1 << 20:
        raise CorruptAdapterError(f"{HEAD_CONFIG}: num_labels is {count!r:.80}, wanted a number; save the head again")
    if not named:
        return tuple(f"LABEL_{number}" for number in range(count))
    numbers = named.values() if isinstance(named, dict) else ()
    if not all(type(number) is int for number in numbers) or sorted(numbers) != list(range(count)):
        raise CorruptAdapterError(f"{HEAD_CONFIG}: label2id does not number {count} labels; save the head again")
    return tuple(sorted(named, key=lambda label: int(named[label])))


def write_head(adapter: Adapter, kind: str, common: Mapping[str, Json]) -> dict[str, bytes]:
    """The two files of a head; none if the adapter has none.

    Args:
        adapter: The adapter.
        kind: Its base's architecture.
        common: What stands beside the configuration in every file.

    Raises:
        UnsupportedAdapterError: If AdapterHub has no such head.
    """
    task = adapter.spec.task
    if task is None or not task.head:
        return {}
    row = next((row for row in HEADS if kind in row.model_types and set(row.head) == set(task.head)), None)
    tensors = adapter.head_tensors()
    ours = {path: number for number, path in row.layers.items()} if row else {}
    if row is None or {key.rpartition(".")[0] for key in tensors} != set(ours):
        raise UnsupportedAdapterError(
            f"the head {', '.join(task.head)} is none that AdapterHub has for {kind}; export the plain model instead"
        )
    labels = task.labels or ("LABEL_0",)
    config = {
        "activation_function": "tanh",
        "bias": True,
        "dropout_prob": None,
        "head_type": "classification",
        "label2id": {label: number for number, label in enumerate(labels)},
        "layers": len(row.layers),
        "num_labels": len(labels),
        "use_pooler": row.pooled,
    }
    stored = {}
    for key, tensor in tensors.items():
        path, _, part = key.rpartition(".")
        stored[f"heads.{common['name']}.{ours[path]}.{part}"] = tensor
    return {HEAD_CONFIG: as_json({"config": config, **common}), HEAD_WEIGHTS: shared.dump(stored)}


def as_json(data: Mapping[str, Json]) -> bytes:
    """The bytes of a configuration, as AdapterHub writes it."""
    return (json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
