"""Modules that `hub compose` trains: `composed.safetensors`, described by the specification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from graftory.adapter import Adapter, AdapterSpec
from graftory.config import ComposedConfig
from graftory.errors import CorruptAdapterError
from graftory.hub.codecs import tensors as shared
from graftory.hub.records import TensorEntry
from graftory.hub.safetensors_header import Bytes

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "composed.safetensors"


class ComposedCodec:
    """Every method whose configuration is a `ComposedConfig`. Keys are those of `Adapter.tensors`.

    The adapters that a module was composed of are not in its file: they are its parents.
    """

    file_names: tuple[str, ...] = (WEIGHTS,)

    def encode(self, adapter: Adapter) -> dict[str, bytes]:
        """See `Codec`."""
        return {WEIGHTS: shared.dump(adapter.tensors)}

    def imported_spec(self, files: Mapping[str, Bytes], name: str) -> AdapterSpec:
        """See `Codec`; always refused, the file alone does not say what it is."""
        found = ", ".join(files)
        raise CorruptAdapterError(f"{name}: {found} without graftory.json; add the folder that hub materialize made")

    def check(self, files: Mapping[str, Bytes], spec: AdapterSpec) -> tuple[TensorEntry, ...]:
        """See `Codec`."""
        data = files[WEIGHTS]
        stored = {tensor.name: tensor for tensor in shared.read_floats(data, WEIGHTS)}
        config = spec.config
        if not isinstance(config, ComposedConfig):
            raise CorruptAdapterError(f"{WEIGHTS}: the specification is of method {spec.method!r}, which is no module")
        wanted = config.tensor_shapes()
        found = {key: tensor.shape for key, tensor in stored.items() if not shared.is_head(key, spec)}
        for key in sorted(wanted.keys() | found.keys()):
            if found.get(key) != wanted.get(key):
                raise CorruptAdapterError(
                    f"{WEIGHTS}: tensor {key!r} is {_said(found.get(key))}, the specification wants "
                    f"{_said(wanted.get(key))}; save both again"
                )
        shared.check_heads(stored, spec, WEIGHTS)
        return shared.entries(stored, data)

    def decode(self, files: Mapping[str, Bytes]) -> dict[str, Tensor]:
        """See `Codec`."""
        return shared.load(files[WEIGHTS])


def _said(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else f"{shape}"
