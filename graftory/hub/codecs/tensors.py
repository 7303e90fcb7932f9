"""What the codecs share: safetensors bytes to checked tensor lists and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from graftory.adapter import AdapterSpec
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from graftory.hub.records import TensorEntry
from graftory.hub.safetensors_header import StoredTensor, read_header

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_EXPONENT = {
    "F64": ("<u8", 0x7FF0 << 48),
    "F32": ("<u4", 0x7F80 << 16),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""The float dtypes that adapters are stored in: integer view and mask of the exponent."""


def read_floats(data: bytes, where: str) -> tuple[StoredTensor, ...]:
    """The tensors of a safetensors file, all of them finite floats.

    Raises:
        CorruptAdapterError: If the file breaks the format, or a weight is NaN or infinite.
        UnsupportedAdapterError: If a tensor is not F16, BF16, F32 or F64.
    """
    stored = read_header(data, where)
    for tensor in stored:
        _check_finite(tensor, data, where)
    return stored


def _check_finite(tensor: StoredTensor, data: bytes, where: str) -> None:
    import numpy as np

    if tensor.dtype not in _EXPONENT:
        raise UnsupportedAdapterError(
            f"{where}: tensor {tensor.name!r} is {tensor.dtype}; save it as one of {', '.join(_EXPONENT)}"
        )
    integers, mask = _EXPONENT[tensor.dtype]
    bits: np.ndarray = np.frombuffer(memoryview(data)[tensor.begin : tensor.end], dtype=integers)
    if bool(((bits & bits.dtype.type(mask)) == mask).any()):
        raise CorruptAdapterError(f"{where}: tensor {tensor.name!r} holds NaN or infinity; train the adapter again")


def entries(stored: Mapping[str, StoredTensor], data: bytes) -> tuple[TensorEntry, ...]:
    """The record's list of tensors, ordered by name."""
    return tuple(
        TensorEntry(name, stored[name].shape, stored[name].dtype, stored[name].sha256(data)) for name in sorted(stored)
    )


def paths_of(keys: Iterable[str], parts: Sequence[str], refusal: str) -> tuple[str, ...]:
    """The module paths that tensors belong to, sorted.

    Args:
        keys: Names of tensors.
        parts: What may stand behind a path.
        refusal: The error's text, with `%r` for the name.

    Raises:
        UnsupportedAdapterError: If a tensor is none of the parts.
    """
    paths = set()
    for key in sorted(keys):
        part = next((part for part in parts if key.endswith(f".{part}")), None)
        if part is None:
            raise UnsupportedAdapterError(refusal % key)
        paths.add(key.removesuffix(f".{part}"))
    return tuple(sorted(paths))


def is_head(key: str, spec: AdapterSpec) -> bool:
    """Whether a tensor belongs to the head that `spec` lists."""
    return spec.task is not None and any(key.startswith(f"{head}.") for head in spec.task.head)


def check_heads(keys: Mapping[str, StoredTensor], spec: AdapterSpec, where: str) -> None:
    """Check that every listed head is there.

    Raises:
        CorruptAdapterError: If a head has no tensor.
    """
    for head in spec.task.head if spec.task else ():
        if not any(key.startswith(f"{head}.") for key in keys):
            raise CorruptAdapterError(
                f"{where}: the specification lists the head {head!r}, the file lacks it; save both"
            )


def dump(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as safetensors bytes, always the same for the same tensors."""
    from safetensors.torch import save

    plain = {key: tensors[key].detach().cpu().contiguous().clone() for key in sorted(tensors)}
    return save(plain, metadata={"format": "pt"})


def load(data: bytes) -> dict[str, Tensor]:
    """The tensors of checked safetensors bytes, on the CPU."""
    from safetensors.torch import load as load_bytes

    loaded: dict[str, Tensor] = load_bytes(data)
    return loaded
