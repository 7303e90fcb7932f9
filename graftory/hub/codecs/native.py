"""Our own format, for what PEFT does not know: `adapter.safetensors`, described by the specification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from graftory.adapter import Adapter, AdapterSpec
from graftory.config import BottleneckConfig
from graftory.errors import CorruptAdapterError
from graftory.hub.codecs import tensors as shared
from graftory.hub.records import TensorEntry
from graftory.hub.safetensors_header import Bytes, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter.safetensors"


class NativeCodec:
    """Bottleneck adapters. Keys are those of `Adapter.tensors`."""

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
        if not isinstance(config, BottleneckConfig):
            raise CorruptAdapterError(f"{WEIGHTS}: the specification is of method {spec.method!r}; wanted bottleneck")
        body = [key for key in stored if not shared.is_head(key, spec)]
        parts = config.parts
        sites = shared.paths_of(body, parts, f"{WEIGHTS}: tensor %r is not understood; wanted <site>.{parts[0]}, ...")
        shared.check_targets(config.targets, WEIGHTS)
        if set(sites) != set(config.targets):
            odd = sorted(set(sites) ^ set(config.targets))[0]
            raise CorruptAdapterError(
                f"{WEIGHTS}: site {odd!r} is only in one of the tensors and the targets; save both"
            )
        for site in sites:
            _check_site(site, stored, config)
        shared.check_heads(stored, spec, WEIGHTS)
        return shared.entries(stored, data)

    def decode(self, files: Mapping[str, Bytes]) -> dict[str, Tensor]:
        """See `Codec`."""
        return shared.load(files[WEIGHTS])


def _check_site(site: str, stored: Mapping[str, StoredTensor], config: BottleneckConfig) -> None:
    found = [stored[f"{site}.{part}"].shape if f"{site}.{part}" in stored else None for part in config.parts]
    up_bias, size = found[3], config.size_of(site)
    width = up_bias[0] if up_bias else 0
    wanted = [(size, width), (size,), (width, size), *([(width,)] * (len(found) - 3))]
    if found != wanted:
        raise CorruptAdapterError(
            f"{WEIGHTS}: site {site!r} has the shapes {found}, wanted {wanted} for size {size}; save the adapter again"
        )
