"""PEFT's two files: `adapter_config.json` and `adapter_model.safetensors`, for the methods that both sides know.

Reading follows PEFT 0.21 to the letter where it changes numbers (scales, ranks, patterns, heads) and
refuses by name what graftory does not do. Where the adapter sits comes from the tensor keys alone:
`target_modules` may be any regular expression and is never evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from graftory.adapter import Adapter, AdapterSpec, BaseModel, Lineage
from graftory.config import AdapterConfig, DoraConfig, Ia3Config, LoraBiasConfig, LoraConfig
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from graftory.hub import strict_json
from graftory.hub.codecs import tensors as shared
from graftory.hub.codecs.peft_common import PeftFile
from graftory.hub.codecs.peft_ia3 import IA3
from graftory.hub.codecs.peft_kind import CONFIG, PREFIX, WEIGHTS, PeftKind
from graftory.hub.codecs.peft_layers import LAYERS
from graftory.hub.codecs.peft_lora import LORA
from graftory.hub.codecs.peft_task import imported_task
from graftory.hub.records import TensorEntry
from graftory.hub.safetensors_header import Bytes, StoredTensor
from graftory.schema import Json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CONFIG", "KINDS", "PREFIX", "WEIGHTS", "WRITES", "PeftCodec", "outlined_spec", "own_name"]

KINDS: Mapping[str, PeftKind] = {kind.peft_type: kind for kind in (LORA, IA3, *LAYERS.values())}
"""PEFT's methods that are read and written, by `peft_type`."""
WRITES: Mapping[type[AdapterConfig], PeftKind] = {
    LoraConfig: LORA,
    LoraBiasConfig: LORA,
    DoraConfig: LORA,
    Ia3Config: IA3,
    **LAYERS,
}
"""What a method is in PEFT's files."""
_ABOVE = "base_model."
"""Prefix of tensors that are no module's."""


class PeftCodec:
    """Adapters as PEFT writes and reads them."""

    file_names: tuple[str, ...] = (CONFIG, WEIGHTS)

    def encode(self, adapter: Adapter) -> dict[str, bytes]:
        """See `Codec`."""
        kind = WRITES[type(adapter.spec.config)]
        weights = shared.dump({_stored_name(key, kind): value for key, value in adapter.tensors.items()})
        return {CONFIG: kind.write(adapter.spec), WEIGHTS: weights}

    def imported_spec(self, files: Mapping[str, Bytes], name: str) -> AdapterSpec:
        """See `Codec`."""
        return _spec(*_read(files), name)

    def check(self, files: Mapping[str, Bytes], spec: AdapterSpec) -> tuple[TensorEntry, ...]:
        """See `Codec`."""
        kind, file, stored = _read(files)
        body = {key: tensor for key, tensor in stored.items() if not shared.is_head(key, spec)}
        found = kind.config(file, body)
        if type(spec.config) is not type(found):
            raise CorruptAdapterError(
                f"{CONFIG}: the specification is of method {spec.method!r}; wanted {found.method}"
            )
        shared.check_targets(spec.config.targets, WEIGHTS)
        if set(found.targets) != set(spec.config.targets):
            odd = sorted(set(found.targets) ^ set(spec.config.targets))[0]
            raise CorruptAdapterError(
                f"{WEIGHTS}: module {odd!r} is only in one of the tensors and the targets; save both"
            )
        kind.check(file, body, spec.config)
        heads = spec.task.head if spec.task else ()
        if set(heads) != set(file.heads_in(tuple(stored))):
            raise CorruptAdapterError(
                f"{CONFIG}: modules_to_save disagree with the heads {sorted(heads)}; save both again"
            )
        shared.check_heads(stored, spec, WEIGHTS)
        return shared.entries(stored, files[WEIGHTS])

    def decode(self, files: Mapping[str, Bytes]) -> dict[str, Tensor]:
        """See `Codec`."""
        return {own_name(key): value for key, value in shared.load(files[WEIGHTS]).items()}


def outlined_spec(
    config: bytes, stored: Sequence[StoredTensor], name: str
) -> tuple[AdapterSpec, tuple[TensorEntry, ...]]:
    """The specification and the shapes of the tensors, from the configuration and the header of the weights
    alone. The tensors have no hash.

    Raises:
        CorruptAdapterError: If a file breaks its format.
        UnsupportedAdapterError: If it uses something graftory does not do.
    """
    kind, file = _read_config(config)
    named = _without_prefix(stored, kind)
    spec = _spec(kind, file, named, name)
    return spec, tuple(TensorEntry(key, named[key].shape, named[key].dtype, "") for key in sorted(named))


def _read(files: Mapping[str, Bytes]) -> tuple[PeftKind, PeftFile, dict[str, StoredTensor]]:
    kind, file = _read_config(bytes(files[CONFIG]))
    return kind, file, _without_prefix(shared.read_floats(files[WEIGHTS], WEIGHTS, empty=kind.may_be_empty), kind)


def _read_config(config: bytes) -> tuple[PeftKind, PeftFile]:
    data: Json = strict_json.loads(config, CONFIG)
    if not isinstance(data, dict):
        raise CorruptAdapterError(f"{CONFIG}: not a JSON object; save the adapter with PEFT again")
    said = data.get("peft_type")
    kind = KINDS.get(said) if isinstance(said, str) else None
    if kind is None:
        raise UnsupportedAdapterError(f"{CONFIG}: peft_type is {said!r:.80}, graftory reads {', '.join(KINDS)}")
    return kind, kind.read(data, CONFIG)


def _stored_name(key: str, kind: PeftKind) -> str:
    return f"{_ABOVE}{key}" if key in kind.shared else f"{PREFIX}{key}"


def own_name(key: str) -> str:
    """A tensor's name in `Adapter.tensors`, by its name in PEFT's file."""
    return key.removeprefix(PREFIX if key.startswith(PREFIX) else _ABOVE)


def _without_prefix(tensors: Iterable[StoredTensor], kind: PeftKind) -> dict[str, StoredTensor]:
    stored = {}
    for tensor in tensors:
        if not tensor.name.startswith(PREFIX) and tensor.name not in {f"{_ABOVE}{name}" for name in kind.shared}:
            raise UnsupportedAdapterError(
                f"{WEIGHTS}: tensor {tensor.name!r} lacks PEFT's prefix {PREFIX!r}; save with PEFT"
            )
        stored[own_name(tensor.name)] = tensor
    return stored


def _spec(kind: PeftKind, file: PeftFile, stored: Mapping[str, StoredTensor], name: str) -> AdapterSpec:
    heads = file.heads_in(tuple(stored))
    body = {key: tensor for key, tensor in stored.items() if not any(key.startswith(f"{head}.") for head in heads)}
    return AdapterSpec(
        base=BaseModel(file.base or "unknown", revision=file.revision),
        config=kind.config(file, body),
        task=imported_task(file.task_type, heads, stored, name),
        lineage=Lineage(process="import", libraries={"peft": file.peft_version} if file.peft_version else {}),
    )
