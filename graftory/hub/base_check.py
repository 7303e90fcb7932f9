"""Whether an adapter fits a base model, from the headers of both: no weights are read, nothing is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graftory.adapter import AdapterSpec
from graftory.config import BottleneckConfig, LoraConfig
from graftory.errors import BaseMismatchError, CorruptAdapterError, DataError
from graftory.hub import strict_json
from graftory.hub.records import TensorEntry
from graftory.hub.safetensors_header import header_bytes, parse_header
from graftory.schema import Json

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
"""What configurations call the width of the residual stream."""
_TRANSPOSED = ("gpt2",)
"""Models whose linear layers are stored as [inputs, outputs]."""
_LAYER = re.compile(r"\.\d+\.")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BaseShapes:
    """What the files of a base model say of it.

    Attributes:
        folder: Where it lies, for error texts.
        architecture: `model_type` of its configuration.
        width: Width of its residual stream, if its configuration says it.
        weights: Shape of every weight, by name.
    """

    folder: str
    architecture: str | None
    width: int | None
    weights: Mapping[str, Shape]


def base_shapes(folder: Path) -> BaseShapes:
    """The shapes of a base model in a folder, from `config.json` and the headers of its safetensors files.

    Raises:
        DataError: If there is no such folder, or no base model with safetensors weights in it.
        CorruptAdapterError: If a file breaks its format.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise DataError(f"{folder}: no config.json here; give the folder of a base model")
    config = strict_json.loads(config_path.read_bytes(), str(config_path))
    if not isinstance(config, dict):
        raise CorruptAdapterError(f"{config_path}: not an object; get the base model again")
    text: Json = config.get("text_config")
    inner = text if isinstance(text, dict) else config
    width = next((inner[key] for key in _WIDTHS if isinstance(inner.get(key), int)), None)
    kind = config.get("model_type")
    weights = {name: shape for file in _weight_files(folder) for name, shape in _header_of(folder / file)}
    return BaseShapes(str(folder), kind if isinstance(kind, str) else None, width, weights)


def check_fits(spec: AdapterSpec, tensors: Sequence[TensorEntry], shapes: BaseShapes) -> None:
    """Check that a base has every module that an adapter changes, in the adapter's widths.

    Modules are looked up by name, with or without the prefix of a task model. If the base's files call all
    of them something else, as older copies of some models do, the widths alone are compared.

    Raises:
        BaseMismatchError: If the architecture, a module or a width differs.
    """
    wanted = spec.base.architecture
    if wanted and shapes.architecture and wanted != shapes.architecture:
        raise BaseMismatchError(
            f"the adapter is of {spec.base.id}, architecture {wanted!r}; {shapes.folder} is {shapes.architecture!r}; "
            "give the base it was trained on"
        )
    found = {tensor.name: tensor.shape for tensor in tensors}
    modules = _Modules(shapes)
    misfits = list(_misfits(spec, found, modules))
    unknown = [path for path, problem in misfits if problem == _MISSING]
    if unknown and len(unknown) == len(spec.config.targets):
        misfits = list(_strange_widths(spec, found, shapes))
    if misfits:
        path, problem = misfits[0]
        more = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
        raise BaseMismatchError(
            f"the adapter does not fit {shapes.folder}: {path}: {problem}{more}; give the base it was trained on, "
            f"{spec.base.id}"
        )


_MISSING = "the base has no such module"


class _Modules:
    """The modules of a base by the names of their weights."""

    def __init__(self, shapes: BaseShapes) -> None:
        self.shapes = shapes
        self.by_end: dict[str, list[str]] = {}
        for name in shapes.weights:
            path = name.rpartition(".")[0]
            self.by_end.setdefault(_end(path), []).append(path)
        self.blocks = {part for name in shapes.weights for part in _parents(name)}

    def weight(self, path: str) -> Shape | None:
        """The shape of a module's weight; the names may differ by what stands in front."""
        for candidate in self.by_end.get(_end(path), ()):
            if _same_module(candidate, path):
                return self.shapes.weights.get(f"{candidate}.weight")
        return None

    def has_block(self, path: str) -> bool:
        """Whether modules lie below a path."""
        return any(_same_module(block, path) for block in self.blocks)


def _misfits(spec: AdapterSpec, found: Mapping[str, Shape], modules: _Modules) -> Iterator[tuple[str, str]]:
    for path in spec.config.targets:
        weight = modules.weight(path)
        if weight is None and not (isinstance(spec.config, BottleneckConfig) and modules.has_block(path)):
            yield path, _MISSING
            continue
        got, wanted = _widths(spec, found, path), _base_widths(spec, weight, modules.shapes)
        if wanted is not None and got != wanted:
            yield path, f"the adapter is {_said(got)} wide, the base {_said(wanted)}"


def _widths(spec: AdapterSpec, found: Mapping[str, Shape], path: str) -> Shape:
    """Inputs and outputs of the module that a LoRA was made for; the width that a bottleneck was made for."""
    if isinstance(spec.config, LoraConfig):
        return found[f"{path}.lora_A.weight"][-1], found[f"{path}.lora_B.weight"][0]
    return (found[f"{path}.adapter_up.weight"][0],)


def _base_widths(spec: AdapterSpec, weight: Shape | None, shapes: BaseShapes) -> Shape | None:
    if isinstance(spec.config, LoraConfig):
        if weight is None or len(weight) != 2:
            return ()
        return weight if shapes.architecture in _TRANSPOSED else weight[::-1]
    if shapes.width is not None:
        return (shapes.width,)
    if weight is None:
        return None
    return (weight[-1 if shapes.architecture in _TRANSPOSED else 0],)


def _strange_widths(spec: AdapterSpec, found: Mapping[str, Shape], shapes: BaseShapes) -> Iterator[tuple[str, str]]:
    """Where no module is known by name: widths that the base has nowhere, layers that it cannot have."""
    known = {tuple(sorted(shape)) for shape in shapes.weights.values() if len(shape) == 2}
    layers = _depth(name for name in shapes.weights)
    for path in spec.config.targets:
        widths = _widths(spec, found, path)
        fits = (
            (shapes.width is None or widths == (shapes.width,)) if len(widths) == 1 else tuple(sorted(widths)) in known
        )
        if not fits:
            yield path, f"the adapter is {_said(widths)} wide, which no weight of the base is"
        elif _depth([f"{path}."]) > layers:
            yield path, f"the base has {layers} layers"
        elif not layers:
            yield path, _MISSING


def _depth(names: Iterable[str]) -> int:
    """One more than the largest layer number in some names."""
    return max((int(number[1:-1]) + 1 for name in names for number in _LAYER.findall(name)), default=0)


def _end(path: str) -> str:
    return path.rpartition(".")[2]


def _same_module(left: str, right: str) -> bool:
    """Whether two paths are equal but for what stands in front of one of them."""
    return left == right or left.endswith(f".{right}") or right.endswith(f".{left}")


def _parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) - 1))


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
    data: Json = strict_json.loads(path.read_bytes(), str(path), limit=strict_json.LARGE)
    names = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and name == Path(name).name for name in names.values()
    ):
        raise CorruptAdapterError(f"{path}: no weight_map of file names; get the base model again")
    return sorted(set(names.values()))


def _header_of(path: Path) -> list[tuple[str, Shape]]:
    try:
        with path.open("rb") as file:
            start = file.read(8)
            head = start + file.read(header_bytes(start, str(path)) - 8)
            tensors = parse_header(head, path.stat().st_size, str(path))
    except FileNotFoundError:
        raise DataError(f"{path}: is missing; get the whole base model") from None
    return [(tensor.name, tensor.shape) for tensor in tensors]
