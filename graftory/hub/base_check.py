"""Whether an adapter fits a base model, from the headers of both: no weights are read, nothing is loaded.

Another model of the same shapes passes: the weights of the base are compared when the adapter is attached.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graftory.adapter import AdapterSpec
from graftory.config import (
    AdapterConfig,
    BottleneckConfig,
    CodaConfig,
    CompacterConfig,
    DoraConfig,
    FusionConfig,
    HyperformerConfig,
    KronaConfig,
    LoraConfig,
    NormedBottleneckConfig,
    PhaConfig,
    PropetlConfig,
    SparseUpdateConfig,
)
from graftory.errors import BaseMismatchError, CorruptAdapterError, DataError
from graftory.hub import strict_json
from graftory.hub.records import TensorEntry
from graftory.hub.safetensors_header import StoredTensor, header_bytes, parse_header
from graftory.schema import Json

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ENDING = ".safetensors"
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
"""What configurations call the width of the residual stream."""
_TRANSPOSED = ("gpt2",)
"""Models whose linear layers are stored as [inputs, outputs]."""
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_RENAMED: Mapping[str, Sequence[tuple[re.Pattern[str], str]]] = {
    "vit": [
        (re.compile(pattern), instead)
        for pattern, instead in (
            (r"(^|\.)layers\.(\d+)", r"\1encoder.layer.\2"),
            (r"\.attention\.q_proj", ".attention.attention.query"),
            (r"\.attention\.k_proj", ".attention.attention.key"),
            (r"\.attention\.v_proj", ".attention.attention.value"),
            (r"\.attention\.o_proj", ".attention.output.dense"),
            (r"\.mlp\.fc1", ".intermediate.dense"),
            (r"\.mlp\.fc2", ".output.dense"),
        )
    ]
}
"""Modules that transformers 5 calls something else than its files do, by architecture: what they are in files."""
_LAYER = re.compile(r"\.\d+\.")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BaseShapes:
    """What the files of a base model say of it.

    Attributes:
        folder: Where it lies, for error texts.
        architecture: `model_type` of its configuration.
        width: Width of its residual stream, if its configuration says it.
        weights: Shape of every weight, by name; None where it is packed, as quantised weights are.
    """

    folder: str
    architecture: str | None
    width: int | None
    weights: Mapping[str, Shape | None]


def base_shapes(folder: Path) -> BaseShapes:
    """The shapes of a base model in a folder, from `config.json` and the headers of its safetensors files.

    Raises:
        DataError: If there is no such folder, or no base model with safetensors weights in it.
        CorruptAdapterError: If a file breaks its format.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise DataError(f"{folder}: no config.json here; give the folder of a base model")
    config = _json(config_path, strict_json.SMALL)
    if not isinstance(config, dict):
        raise CorruptAdapterError(f"{config_path}: not an object; get the base model again")
    text: Json = config.get("text_config")
    inner = text if isinstance(text, dict) else config
    width = next((inner[key] for key in _WIDTHS if isinstance(inner.get(key), int)), None)
    kind = config.get("model_type")
    tensors = [tensor for file in _weight_files(folder) for tensor in _header_of(folder / file)]
    weights = {tensor.name: tensor.shape if tensor.dtype in _FLOATS else None for tensor in tensors}
    return BaseShapes(str(folder), kind if isinstance(kind, str) else None, width, weights)


def check_fits(spec: AdapterSpec, tensors: Sequence[TensorEntry], shapes: BaseShapes) -> None:
    """Check that a base has every module that an adapter changes, in the adapter's widths.

    Modules are looked up by name, with or without the prefix of a task model. If the files of a base of the
    same architecture call all of them something else, the widths and the number of layers alone are compared.
    Heads are the adapter's own, and quantised weights do not show their widths: neither is compared.

    Raises:
        BaseMismatchError: If the architecture, a module or a width differs.
        CorruptAdapterError: If the adapter lacks a tensor, or it has an impossible shape.
    """
    wanted = spec.base.architecture
    if wanted and shapes.architecture and wanted != shapes.architecture:
        raise BaseMismatchError(
            f"the adapter is of {spec.base.id}, architecture {wanted!r}; {shapes.folder} is {shapes.architecture!r}; "
            "give the base it was trained on"
        )
    needs = list(_needs(spec, {tensor.name: tensor.shape for tensor in tensors}))
    misfits = list(_misfits(needs, _Modules(shapes)))
    alike = wanted is not None and wanted == shapes.architecture
    if alike and len([problem for _, problem in misfits if problem == _MISSING]) == len(needs):
        misfits = list(_strange_widths(needs, shapes))
    if misfits:
        path, problem = misfits[0]
        raise BaseMismatchError(
            f"the adapter does not fit {shapes.folder}: {path}: {problem} ({len(misfits)} of {len(needs)} modules do "
            f"not fit); give the base it was trained on, {spec.base.id}"
        )


@dataclass(frozen=True, slots=True)
class _Need:
    """A module that an adapter changes.

    Attributes:
        path: Its path, as the adapter spells it.
        widths: Inputs and outputs of a linear layer, the width of the residual stream, or empty if the adapter
            does not say them.
    """

    path: str
    widths: Shape

    @property
    def is_linear(self) -> bool:
        """Whether it must be a linear layer."""
        return len(self.widths) == 2


def _needs(spec: AdapterSpec, found: Mapping[str, Shape]) -> Iterator[_Need]:
    make = _NEEDS.get(type(spec.config))
    if make is None:
        return (_Need(path, ()) for path in spec.config.targets)
    return make(spec.config, found)


def _lora_needs(config: AdapterConfig, found: Mapping[str, Shape]) -> Iterator[_Need]:
    for path in config.targets:
        down, up = (_matrix(found, f"{path}.{part}") for part in LoraConfig.parts)  # DoRA's first two as well
        yield _Need(path, (down[1], up[0]))


def _bottleneck_needs(config: AdapterConfig, found: Mapping[str, Shape]) -> Iterator[_Need]:
    for path in config.targets:
        yield _Need(path, (_matrix(found, f"{path}.{BottleneckConfig.parts[2]}")[0],))


def _compacter_needs(config: AdapterConfig, found: Mapping[str, Shape]) -> Iterator[_Need]:
    for path in config.targets:
        yield _Need(path, found.get(f"{path}.{CompacterConfig.parts[5]}", ()))


def _propetl_needs(config: AdapterConfig, found: Mapping[str, Shape]) -> Iterator[_Need]:
    # one prototype, so one width
    width = found.get(f"{config.targets[0]}.{PropetlConfig.parts[5]}", ())
    return (_Need(path, width) for path in config.targets)


def _krona_needs(config: AdapterConfig, found: Mapping[str, Shape]) -> Iterator[_Need]:
    for path in config.targets:
        (p, f), (g, q) = (_matrix(found, f"{path}.{part}") for part in KronaConfig.parts)
        yield _Need(path, (g * q, p * f))


def _sparse_needs(config: AdapterConfig, found: Mapping[str, Shape]) -> Iterator[_Need]:
    assert isinstance(config, SparseUpdateConfig)
    for place in config.sparse:
        yield _Need(place.path, (place.inputs, place.outputs))
    if config.low_rank is not None:
        yield from _lora_needs(config.low_rank, found)


def _fusion_needs(config: AdapterConfig, found: Mapping[str, Shape]) -> Iterator[_Need]:
    del found  # the configuration knows the widths
    for place in config.places if isinstance(config, FusionConfig) else ():
        yield _Need(place.path, (place.inputs, place.outputs) if place.track == "lora" else (place.outputs,))


def _hyper_needs(config: AdapterConfig, found: Mapping[str, Shape]) -> Iterator[_Need]:
    del found  # the configuration knows the widths
    for place in config.places if isinstance(config, HyperformerConfig) else ():
        lora = isinstance(config, HyperformerConfig) and config.generates == "lora"
        yield _Need(place.path, (place.inputs, place.outputs) if lora else (place.outputs,))


_NEEDS: Mapping[type[AdapterConfig], Callable[[AdapterConfig, Mapping[str, Shape]], Iterator[_Need]]] = {
    LoraConfig: _lora_needs,
    DoraConfig: _lora_needs,
    BottleneckConfig: _bottleneck_needs,
    CodaConfig: _bottleneck_needs,
    CompacterConfig: _compacter_needs,
    PropetlConfig: _propetl_needs,
    KronaConfig: _krona_needs,
    SparseUpdateConfig: _sparse_needs,
    NormedBottleneckConfig: _bottleneck_needs,
    HyperformerConfig: _hyper_needs,
    PhaConfig: _hyper_needs,
    FusionConfig: _fusion_needs,
}
"""What each method needs; of another one, its modules by name."""


def _matrix(found: Mapping[str, Shape], name: str) -> Shape:
    shape = found.get(name)
    if shape is None or len(shape) != 2:
        raise CorruptAdapterError(
            f"tensor {name!r:.200} is {shape or 'missing'}, wanted a matrix; get the adapter again"
        )
    return shape


_MISSING = "the base has no such module"


class _Modules:
    """The modules of a base by the names of their weights."""

    def __init__(self, shapes: BaseShapes) -> None:
        self.shapes = shapes
        self.weights = {self.spelled(name): shape for name, shape in shapes.weights.items()}
        self.by_end: dict[str, dict[str, None]] = {}
        for name in self.weights:
            for path in _prefixes(name):
                self.by_end.setdefault(_end(path), {})[path] = None

    def spelled(self, path: str) -> str:
        """A path as files spell it."""
        for pattern, instead in _RENAMED.get(self.shapes.architecture or "", ()):
            path = pattern.sub(instead, path)
        return path

    def find(self, path: str) -> str | None:
        """A module's path in the files, which may differ by what stands in front."""
        wanted = self.spelled(path)
        candidates = self.by_end.get(_end(wanted), {})
        return wanted if wanted in candidates else next((c for c in candidates if _same_module(c, wanted)), None)

    def widths(self, need: _Need, path: str) -> Shape | None:
        """The widths of a module; None if the files do not show them, empty if it is no linear layer."""
        weight = self.weights.get(f"{path}.weight")
        transposed = self.shapes.architecture in _TRANSPOSED
        if not need.is_linear:
            side = (weight[-1 if transposed else 0],) if weight else None
            return side if self.shapes.width is None else (self.shapes.width,)
        if weight is None:
            return None if self._is_packed(path) else ()
        return () if len(weight) != 2 else weight if transposed else weight[::-1]

    def _is_packed(self, path: str) -> bool:
        """Whether a module keeps whole numbers instead of a weight."""
        return any(shape is None for name, shape in self.weights.items() if name.rpartition(".")[0] == path)


def _misfits(needs: Iterable[_Need], modules: _Modules) -> Iterator[tuple[str, str]]:
    for need in needs:
        path = modules.find(need.path)
        if path is None:
            yield need.path, _MISSING
            continue
        wanted = modules.widths(need, path) if need.widths else None
        if wanted is not None and need.widths != wanted:
            yield need.path, f"the adapter is {_said(need.widths)} wide, the base {_said(wanted)}"


def _strange_widths(needs: Iterable[_Need], shapes: BaseShapes) -> Iterator[tuple[str, str]]:
    """Where no module is known by name: widths that the base has nowhere, layers that it cannot have."""
    known = {tuple(sorted(shape)) for shape in shapes.weights.values() if shape is not None and len(shape) == 2}
    layers = _depth(shapes.weights)
    for need in needs:
        residual = shapes.width is None or need.widths == (shapes.width,)
        fits = tuple(sorted(need.widths)) in known if need.is_linear else residual
        if not layers or not need.widths:
            yield need.path, _MISSING
        elif not fits:
            yield need.path, f"the adapter is {_said(need.widths)} wide, which no weight of the base is"
        elif _depth([f"{need.path}."]) > layers:
            yield need.path, f"the base has {layers} layers"


def _depth(names: Iterable[str]) -> int:
    """One more than the largest layer number in some names."""
    return max((int(number[1:-1]) + 1 for name in names for number in _LAYER.findall(name)), default=0)


def _end(path: str) -> str:
    return path.rpartition(".")[2]


def _same_module(left: str, right: str) -> bool:
    """Whether two paths are equal but for what stands in front of one of them."""
    return left == right or left.endswith(f".{right}") or right.endswith(f".{left}")


def _prefixes(name: str) -> Iterator[str]:
    """The module of a weight and all that it lies in."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _said(widths: Shape) -> str:
    return " x ".join(map(str, widths)) or "no linear layer,"


def _weight_files(folder: Path) -> list[str]:
    if (folder / _WEIGHTS).is_file():
        return [_WEIGHTS]
    path = folder / _INDEX
    if not path.is_file():
        raise DataError(
            f"{folder}: wanted {_WEIGHTS} or {_INDEX}; other formats have no header to check, load the base"
        )
    data = _json(path, strict_json.LARGE)
    names = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and name == Path(name).name and name.endswith(_ENDING) for name in names.values()
    ):
        raise CorruptAdapterError(f"{path}: no weight_map of file names; get the base model again")
    return sorted(set(names.values()))


def _json(path: Path, limit: int) -> Json:
    try:
        with path.open("rb") as file:
            return strict_json.loads(file.read(limit + 1), str(path), limit=limit)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a folder that you may read") from None


def _header_of(path: Path) -> tuple[StoredTensor, ...]:
    try:
        with path.open("rb") as file:
            start = file.read(8)
            head = start + file.read(header_bytes(start, str(path)) - 8)
            return parse_header(head, path.stat().st_size, str(path))
    except FileNotFoundError:
        raise DataError(f"{path}: is missing; get the whole base model") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a folder that you may read") from None
