"""Our own format, for what PEFT does not know: `adapter.safetensors`, described by the specification."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from graftory.adapter import Adapter, AdapterSpec
from graftory.config import AdapterConfig, BitfitConfig, BottleneckConfig, PrefixConfig
from graftory.errors import CorruptAdapterError
from graftory.hub.codecs import tensors as shared
from graftory.hub.records import TensorEntry
from graftory.hub.safetensors_header import Bytes, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter.safetensors"


class NativeCodec:
    """Bottleneck adapters, bias deltas and prefixes. Keys are those of `Adapter.tensors`."""

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
        check_site = next((check for kind, check in _SITES.items() if isinstance(config, kind)), None)
        if check_site is None:
            raise CorruptAdapterError(
                f"{WEIGHTS}: the specification is of method {spec.method!r}; wanted bottleneck, bitfit or prefix"
            )
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
            check_site(site, stored, config)
        shared.check_heads(stored, spec, WEIGHTS)
        return shared.entries(stored, data)

    def decode(self, files: Mapping[str, Bytes]) -> dict[str, Tensor]:
        """See `Codec`."""
        return shared.load(files[WEIGHTS])


def _check_bottleneck(site: str, stored: Mapping[str, StoredTensor], config: Any) -> None:
    assert isinstance(config, BottleneckConfig)
    found = [stored[f"{site}.{part}"].shape if f"{site}.{part}" in stored else None for part in config.parts]
    up_bias, size = found[3], config.size_of(site)
    width = up_bias[0] if up_bias else 0
    wanted = [(size, width), (size,), (width, size), *([(width,)] * (len(found) - 3))]
    if found != wanted:
        raise CorruptAdapterError(
            f"{WEIGHTS}: site {site!r} has the shapes {found}, wanted {wanted} for size {size}; save the adapter again"
        )


def _check_bitfit(site: str, stored: Mapping[str, StoredTensor], config: Any) -> None:
    shape = stored[f"{site}.{config.parts[0]}"].shape
    if len(shape) != 1:
        raise CorruptAdapterError(f"{WEIGHTS}: {site}.{config.parts[0]} is {shape}, wanted (d,); save it again")


def _check_prefix(site: str, stored: Mapping[str, StoredTensor], config: Any) -> None:
    assert isinstance(config, PrefixConfig)
    shapes = [stored[f"{site}.{part}"].shape if f"{site}.{part}" in stored else None for part in config.parts]
    width = shapes[0][-1] if shapes[0] else 0
    wanted = [(config.length, width)] * 2
    if shapes != wanted:
        raise CorruptAdapterError(f"{WEIGHTS}: site {site!r} has the shapes {shapes}, wanted {wanted}; save it again")


_SITES: Mapping[type[AdapterConfig], Callable[[str, Mapping[str, StoredTensor], Any], None]] = {
    BottleneckConfig: _check_bottleneck,
    BitfitConfig: _check_bitfit,
    PrefixConfig: _check_prefix,
}
"""How the tensors of one site are checked, by method."""
