"""Our own format, for what PEFT does not know: `adapter.safetensors`, described by the specification."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from graftory.adapter import Adapter, AdapterSpec
from graftory.config import (
    AdapterConfig,
    AptConfig,
    BitfitConfig,
    BottleneckConfig,
    CodaConfig,
    CompacterConfig,
    KronaConfig,
    PrefixConfig,
    PropetlConfig,
    SparseUpdateConfig,
    UnipeltConfig,
    UpdateConfig,
)
from graftory.errors import CorruptAdapterError
from graftory.hub.codecs import tensors as shared
from graftory.hub.records import TensorEntry
from graftory.hub.safetensors_header import Bytes, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter.safetensors"


class NativeCodec:
    """Every method that is a few tensors at each of its sites. Keys are those of `Adapter.tensors`."""

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
        config = spec.config
        bits, whole = (tuple(f".{part}" for part in parts) for parts in (config.bits, config.whole_numbers))
        stored = {tensor.name: tensor for tensor in shared.read_floats(data, WEIGHTS, bits=bits, whole=whole)}
        check_site = next((check for kind, check in _SITES.items() if isinstance(config, kind)), None)
        if check_site is None:
            raise CorruptAdapterError(
                f"{WEIGHTS}: the specification is of method {spec.method!r}; wanted one of "
                + ", ".join(kind.method for kind in _SITES)
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
        if isinstance(config, SparseUpdateConfig):
            _check_positions(data, stored, config)
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


def _check_update(site: str, stored: Mapping[str, StoredTensor], config: Any) -> None:
    assert isinstance(config, UpdateConfig)
    bias = stored.get(f"{site}.{config.parts[4]}")
    down = stored.get(f"{site}.{config.parts[0]}")
    d_out = bias.shape[0] if bias is not None and bias.shape else 0
    d_in = down.shape[-1] if down is not None and down.shape else 0
    rank = config.rank_of(site)
    product = [(rank, d_in), (d_out, rank), (d_out,), (d_in,)]
    _check_shapes(site, stored, config, [*([None] * 4 if site in config.bias_only else product), (d_out,)])


def _check_sparse(site: str, stored: Mapping[str, StoredTensor], config: Any) -> None:
    assert isinstance(config, SparseUpdateConfig)
    place, lora = config.place_of(site), config.low_rank
    entries: list[Any] = [None, None] if place is None else [(place.count,)] * 2
    factors: list[Any] = [None, None]
    if lora is not None and site in lora.targets:
        rank = lora.rank_of(site)
        a, b = config.parts[2:]
        factors = [(rank, _width(site, stored, a, at=1)), (_width(site, stored, b), rank)]
    _check_shapes(site, stored, config, [*entries, *factors])


def _check_positions(data: Bytes, stored: Mapping[str, StoredTensor], config: SparseUpdateConfig) -> None:
    """Whether all positions are in their weight, and each above the one before it."""
    import numpy as np

    for place in config.sparse:
        tensor = stored[f"{place.path}.{config.parts[0]}"]
        found: np.ndarray = np.frombuffer(memoryview(data)[tensor.begin : tensor.end], dtype="<i4")
        most = place.inputs * place.outputs
        if int(found[0]) < 0 or int(found[-1]) >= most or not bool((found[1:] > found[:-1]).all()):
            raise CorruptAdapterError(
                f"{WEIGHTS}: site {place.path!r} wants rising positions from 0 to {most - 1}; save the adapter again"
            )


def _check_prefix(site: str, stored: Mapping[str, StoredTensor], config: Any) -> None:
    assert isinstance(config, PrefixConfig)
    shapes = [stored[f"{site}.{part}"].shape if f"{site}.{part}" in stored else None for part in config.parts]
    width = shapes[0][-1] if shapes[0] else 0
    wanted: list[tuple[int, ...]] = [(config.length, width)] * 2
    if isinstance(config, AptConfig):
        wanted += [(config.length, _width(site, stored, config.parts[2], at=1)), (1,)]
    if shapes != wanted:
        raise CorruptAdapterError(f"{WEIGHTS}: site {site!r} has the shapes {shapes}, wanted {wanted}; save it again")


def _check_compacter(site: str, stored: Mapping[str, StoredTensor], config: Any) -> None:
    assert isinstance(config, CompacterConfig)
    n, k, size = config.division, config.factor_rank, config.size_of(site)
    bias = stored.get(f"{site}.{config.parts[5]}")
    width = bias.shape[0] if bias is not None and bias.shape else 0
    sides = [(n, size // n, k), (n, k, width // n), (size,), (n, width // n, k), (n, k, size // n), (width,)]
    shared = [(n, n, n)] if site == config.targets[0] else [None]
    _check_shapes(site, stored, config, [*sides, *shared])
    if width % n:
        raise CorruptAdapterError(f"{WEIGHTS}: site {site!r} is {width} wide, no multiple of {n}; save it again")


def _check_propetl(site: str, stored: Mapping[str, StoredTensor], config: Any) -> None:
    assert isinstance(config, PropetlConfig)
    size, first = config.size, config.targets[0]
    width = _width(first, stored, config.parts[5])
    masks: list[Any] = [(-(-size * width // 8),)] * 2
    prototype = [(size, width), (size,), (width, size), (width,)]
    _check_shapes(site, stored, config, [*masks, *(prototype if site == first else [None] * 4)])


def _check_krona(site: str, stored: Mapping[str, StoredTensor], config: Any) -> None:
    assert isinstance(config, KronaConfig)
    shapes = [stored[f"{site}.{part}"].shape if f"{site}.{part}" in stored else () for part in config.parts]
    (p, f), (_, q) = (shape if len(shape) == 2 else (0, 0) for shape in shapes)
    _check_shapes(site, stored, config, [(p, f), (f, q)])
    if f > config.factor:
        raise CorruptAdapterError(f"{WEIGHTS}: site {site!r} has {f} columns, factor is {config.factor}; save both")


def _check_unipelt(site: str, stored: Mapping[str, StoredTensor], config: Any) -> None:
    assert isinstance(config, UnipeltConfig)
    a, b, keys, values, down, down_bias, up, up_bias, gate, bias = config.parts
    wide, own = _width(site, stored, gate), _width(site, stored, up_bias)
    out = _width(site, stored, b)
    key = _width(site, stored, keys, at=1)
    shapes: dict[str, Any] = {a: (config.rank, wide), b: (out, config.rank)}
    if site in config.attentions:
        shapes = dict.fromkeys((keys, values), (config.length, key))
    elif site in config.ends:
        shapes = {down: (config.size, own), down_bias: (config.size,), up: (own, config.size), up_bias: (own,)}
    _check_shapes(site, stored, config, [{**shapes, gate: (wide,), bias: (1,)}.get(part) for part in config.parts])


def _check_coda(site: str, stored: Mapping[str, StoredTensor], config: Any) -> None:
    assert isinstance(config, CodaConfig)
    size, width = config.size, _width(site, stored, config.parts[3])
    _check_shapes(site, stored, config, [(size, width), (size,), (width, size), (width,), (width,)])


def _width(site: str, stored: Mapping[str, StoredTensor], part: str, *, at: int = 0) -> int:
    shape = stored[f"{site}.{part}"].shape if f"{site}.{part}" in stored else ()
    return shape[at] if len(shape) > at else 0


def _check_shapes(site: str, stored: Mapping[str, StoredTensor], config: AdapterConfig, wanted: list[Any]) -> None:
    names = [f"{site}.{part}" for part in config.parts]
    shapes = [stored[name].shape if name in stored else None for name in names]
    if shapes != wanted:
        raise CorruptAdapterError(f"{WEIGHTS}: site {site!r} has the shapes {shapes}, wanted {wanted}; save it again")


_SITES: Mapping[type[AdapterConfig], Callable[[str, Mapping[str, StoredTensor], Any], None]] = {
    CompacterConfig: _check_compacter,
    PropetlConfig: _check_propetl,
    BottleneckConfig: _check_bottleneck,
    KronaConfig: _check_krona,
    UnipeltConfig: _check_unipelt,
    CodaConfig: _check_coda,
    BitfitConfig: _check_bitfit,
    UpdateConfig: _check_update,
    SparseUpdateConfig: _check_sparse,
    PrefixConfig: _check_prefix,
}
"""How the tensors of one site are checked, by method."""
