"""Adapters in few bits: `packed.safetensors`, of any method that has a file of its own. What is lost is lost.

Tensors of the body are written as codes and levels (`Packer`), all of them one after another: `::codes`, `::levels`,
and `::index` with the JSON of their names and shapes, `[[name, [size, ...]], ...]` by name. Heads, and what a packer
leaves alone, are there as they are. Decoding gives fp32, and what it gives is checked by the codec of the method: a
packed adapter is as whole as any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from graftory.adapter import Adapter, AdapterSpec, Storage
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from graftory.hub import strict_json
from graftory.hub.codecs import tensors as shared
from graftory.hub.records import TensorEntry
from graftory.hub.safetensors_header import Bytes, read_header
from graftory.schema import Json, canonical

if TYPE_CHECKING:
    from torch import Tensor

    from graftory.hub.codecs import Codec

WEIGHTS = "packed.safetensors"
CODES, LEVELS, INDEX = "::codes", "::levels", "::index"
Shape = tuple[int, ...]
_SHORTEST = 16
"""Numbers below which a tensor, or a row, is not worth levels of its own."""


@dataclass(frozen=True, slots=True)
class Packer:
    """A way to write a tensor in few bits.

    Attributes:
        vectors: Whether it packs vectors (biases, magnitudes) too.
        pack: A tensor in fp32 -> codes and levels.
        unpack: (codes, levels, shape) -> the tensor in fp32.
        codes: The dtype of codes, in safetensors' words.
        sizes: A shape -> how many codes and levels it has.
    """

    vectors: bool
    pack: Callable[[Tensor], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor, Shape], Tensor]
    codes: str
    sizes: Callable[[Shape], tuple[int, int]]

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor is packed; bits are so already."""
        if not tensor.is_floating_point():
            return False
        return tensor.numel() >= _SHORTEST and (self.vectors or sum(size > 1 for size in tensor.shape) > 1)


def rows_of(tensor: Tensor) -> Tensor:
    """[rows, d], a scale for each in 8 bits: along the last dimension, or all numbers in one row if that is short."""
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.shape[-1] >= _SHORTEST else tensor.reshape(1, -1)


def _pack_8bit(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """round(x / s), s = max |x| / 127 of the row."""
    import torch

    rows = rows_of(tensor)
    levels = rows.abs().amax(1) / 127
    safe = torch.where(levels > 0, levels, 1.0)
    return (rows / safe[:, None]).round().clamp(-127, 127).to(torch.int8).flatten(), levels


def _unpack_8bit(codes: Tensor, levels: Tensor, shape: Shape) -> Tensor:
    return (codes.float().view(len(levels), -1) * levels[:, None]).reshape(shape)


def _sizes_8bit(shape: Shape) -> tuple[int, int]:
    count = math.prod(shape)
    return count, count // shape[-1] if shape[-1] >= _SHORTEST else 1


def _sizes_bits(levels: int) -> Callable[[Shape], tuple[int, int]]:
    return lambda shape: (math.ceil(math.prod(shape) / 8), levels)


def _pack_1bit(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Whether x ≥ μ; the levels are the means of those below and above."""
    import torch

    above = tensor >= tensor.mean()
    parts = [tensor[~above], tensor[above]]
    levels = torch.stack([part.mean() if part.numel() else tensor.mean() for part in parts])
    return _bits(above), levels


def _unpack_1bit(codes: Tensor, levels: Tensor, shape: Shape) -> Tensor:
    return levels[_flags(codes, shape).long()]


def _pack_bitdelta(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """sign(x) and α = mean |x|, which is the α of the least squares."""
    return _bits(tensor >= 0), tensor.abs().mean().reshape(1)


def _unpack_bitdelta(codes: Tensor, levels: Tensor, shape: Shape) -> Tensor:
    return levels * (_flags(codes, shape).float() * 2 - 1)


def _bits(flags: Tensor) -> Tensor:
    """Flags as bytes, the first flag in the highest bit."""
    import numpy as np
    import torch

    return torch.from_numpy(np.packbits(flags.flatten().numpy()))


def _flags(codes: Tensor, shape: Shape) -> Tensor:
    import numpy as np
    import torch

    count = math.prod(shape)
    return torch.from_numpy(np.unpackbits(codes.numpy(), count=count).astype(bool)).reshape(shape)


PACKERS: Mapping[Storage, Packer] = {
    "8bit": Packer(True, _pack_8bit, _unpack_8bit, "I8", _sizes_8bit),
    "1bit": Packer(False, _pack_1bit, _unpack_1bit, "U8", _sizes_bits(2)),
    "bitdelta": Packer(False, _pack_bitdelta, _unpack_bitdelta, "U8", _sizes_bits(1)),
}
"""Every way but as it is: absmax of each row; BI-Adapter (Jie et al. 2023, arXiv:2307.16867), two levels for each
tensor; BitDelta (Liu et al. 2024, arXiv:2402.10193), one."""


class PackedCodec:
    """Every adapter whose specification says another storage than `full`."""

    file_names: tuple[str, ...] = (WEIGHTS,)

    def encode(self, adapter: Adapter) -> dict[str, bytes]:
        """See `Codec`.

        Raises:
            UnsupportedAdapterError: If nothing of it can be packed.
        """
        import torch

        packer, spec = _packer(adapter.spec), adapter.spec
        plain = {name: tensor.detach().cpu() for name, tensor in adapter.tensors.items()}
        packed = sorted(name for name, tensor in plain.items() if not adapter.is_head(name) and packer.takes(tensor))
        if not packed:
            raise UnsupportedAdapterError(
                f"storage {spec.storage}: a {spec.method} adapter has only vectors and a head, which it leaves as they "
                "are; take 8bit"
            )
        parts = [packer.pack(plain[name].float().contiguous()) for name in packed]
        index = canonical([[name, list(plain[name].shape)] for name in packed])
        stored = {name: tensor for name, tensor in plain.items() if name not in packed}
        stored |= {
            CODES: torch.cat([codes for codes, _ in parts]),
            LEVELS: torch.cat([levels for _, levels in parts]),
            INDEX: torch.frombuffer(bytearray(index), dtype=torch.uint8),
        }
        return {WEIGHTS: shared.dump(stored)}

    def imported_spec(self, files: Mapping[str, Bytes], name: str) -> AdapterSpec:
        """See `Codec`; always refused, the file alone does not say what it is."""
        found = ", ".join(files)
        raise CorruptAdapterError(f"{name}: {found} without graftory.json; add the folder that hub materialize made")

    def check(self, files: Mapping[str, Bytes], spec: AdapterSpec) -> tuple[TensorEntry, ...]:
        """See `Codec`. The list is of the tensors that it decodes to."""
        whole = Adapter(_full(spec), _unpacked(files[WEIGHTS], _packer(spec)))
        codec = _codec_of(spec)
        return codec.check(codec.encode(whole), whole.spec)

    def decode(self, files: Mapping[str, Bytes]) -> dict[str, Tensor]:
        """See `Codec`."""
        data = files[WEIGHTS]
        for packer in PACKERS.values():
            try:
                return _unpacked(data, packer)
            except CorruptAdapterError:  # noqa: PERF203 (of another storage)
                continue
        raise CorruptAdapterError(f"{WEIGHTS}: is packed in no way known here; get the adapter again")


def unpacked(spec: AdapterSpec, files: Mapping[str, Bytes]) -> tuple[AdapterSpec, Mapping[str, Bytes]]:
    """An adapter's specification and checked files as its method has them; those that are not packed as they are."""
    if spec.storage == "full":
        return spec, files
    whole = Adapter(_full(spec), PackedCodec().decode(files))
    return whole.spec, _codec_of(spec).encode(whole)


def _unpacked(data: Bytes, packer: Packer) -> dict[str, Tensor]:
    """All tensors, after a look at whether the parts fit: no number of a file decides how much is made of it."""
    dtypes = {tensor.name: (tensor.dtype, len(tensor.shape)) for tensor in read_header(data, WEIGHTS)}
    wanted = {CODES: (packer.codes, 1), LEVELS: ("F32", 1), INDEX: ("U8", 1)}
    if any(dtypes.get(name) != kind for name, kind in wanted.items()):
        raise CorruptAdapterError(f"{WEIGHTS}: wanted {', '.join(wanted)} of {packer.codes}, F32, U8; get it again")
    stored = shared.load(data)
    codes, levels, index = (stored.pop(name) for name in wanted)
    shapes = _shapes(bytes(index.numpy()))
    sizes = [packer.sizes(shape) for shape in shapes.values()]
    counts = [sum(size) for size in zip(*sizes, strict=True)]
    if counts != [len(codes), len(levels)] or stored.keys() & shapes.keys():
        raise CorruptAdapterError(
            f"{WEIGHTS}: {len(codes)} codes and {len(levels)} levels for tensors of {counts}; get the adapter again"
        )
    parts = zip(codes.split([size for size, _ in sizes]), levels.split([size for _, size in sizes]), strict=True)
    return stored | {
        name: packer.unpack(own, level, shape)
        for (name, shape), (own, level) in zip(shapes.items(), parts, strict=True)
    }


def _shapes(index: bytes) -> dict[str, Shape]:
    """The names and shapes of what is packed, strictly: at least one, each once, sizes of 1 and more."""
    listed = strict_json.loads(index, f"{WEIGHTS}: {INDEX}")
    rows = listed if isinstance(listed, list) else []
    good = [
        row for row in rows if isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and _sizes(row[1])
    ]
    shapes = {name: tuple(sizes) for name, sizes in good}
    if not rows or len(shapes) != len(rows):
        raise CorruptAdapterError(f"{WEIGHTS}: {INDEX} is no list of names and shapes; get the adapter again")
    return shapes


def _sizes(value: Json) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 8 and all(type(size) is int and size > 0 for size in value)


def _packer(spec: AdapterSpec) -> Packer:
    packer = PACKERS.get(spec.storage)
    if packer is None:
        raise CorruptAdapterError(f"{WEIGHTS}: the specification says storage {spec.storage!r}; save both again")
    return packer


def _full(spec: AdapterSpec) -> AdapterSpec:
    return replace(spec, storage="full")


def _codec_of(spec: AdapterSpec) -> Codec:
    from graftory.hub.codecs import codec_of

    return codec_of(_full(spec))
