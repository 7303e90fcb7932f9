"""What the codecs share: safetensors bytes to checked tensor lists and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from graftory.adapter import AdapterSpec
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from graftory.hub.records import TensorEntry
from graftory.hub.safetensors_header import Bytes, StoredTensor, read_header

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
_BLOCK = 1 << 15
_OUTPUT_LAYERS = ("out_proj", "classifier", "score")
"""Names of a head's last layer, where it has several."""


def read_floats(
    data: Bytes, where: str, *, empty: bool = False, bits: tuple[str, ...] = (), whole: tuple[str, ...] = ()
) -> tuple[StoredTensor, ...]:
    """The tensors of a safetensors file, all of them floats but those that are bytes of bits or whole numbers.

    Args:
        data: The file.
        where: Its name.
        empty: Whether a tensor may hold no number.
        bits: Ends of the names of tensors that are bytes of bits.
        whole: Ends of the names of tensors that are whole numbers.

    Raises:
        CorruptAdapterError: If the file breaks the format, or a tensor is empty.
        UnsupportedAdapterError: If a tensor is not F16, BF16, F32 or F64, one of bits is not U8, or one of whole
            numbers is not I32.
    """
    stored = read_header(data, where)
    for tensor in stored:
        if bits and tensor.name.endswith(bits):
            if tensor.dtype != "U8":
                raise UnsupportedAdapterError(
                    f"{where}: tensor {tensor.name!r} is {tensor.dtype}; pack it to bits and save it as U8"
                )
        elif whole and tensor.name.endswith(whole):
            if tensor.dtype != "I32":
                raise UnsupportedAdapterError(f"{where}: tensor {tensor.name!r} is {tensor.dtype}; save it as I32")
        elif tensor.dtype not in _EXPONENT:
            raise UnsupportedAdapterError(
                f"{where}: tensor {tensor.name!r} is {tensor.dtype}; save it as one of {', '.join(_EXPONENT)}"
            )
        if tensor.begin == tensor.end and not empty:
            raise CorruptAdapterError(f"{where}: tensor {tensor.name!r} holds no number; save the adapter again")
    return stored


def check_finite(files: Mapping[str, Bytes]) -> None:
    """Check that no weight in checked files is NaN or infinite.

    Raises:
        CorruptAdapterError: If one is; the tensor is named.
    """
    for name, data in files.items():
        if name.endswith(".safetensors"):
            for tensor in read_header(data, name):
                # whole numbers are finite; whether a format may hold them, its codec says
                if tensor.dtype in _EXPONENT and not _is_finite(tensor, data):
                    raise CorruptAdapterError(
                        f"{name}: tensor {tensor.name!r} holds NaN or infinity; train the adapter again, or take it "
                        "as it is with --allow-nonfinite"
                    )


def _is_finite(tensor: StoredTensor, data: Bytes) -> bool:
    import numpy as np

    integers, mask = _EXPONENT[tensor.dtype]
    bits: np.ndarray = np.frombuffer(memoryview(data)[tensor.begin : tensor.end], dtype=integers)
    exponent = bits.dtype.type(mask)
    # block by block, so that what is computed stays in the processor's cache
    return all(bool(((bits[at : at + _BLOCK] & exponent) != exponent).all()) for at in range(0, len(bits), _BLOCK))


def entries(stored: Mapping[str, StoredTensor], data: Bytes) -> tuple[TensorEntry, ...]:
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


def check_targets(targets: Sequence[str], where: str) -> None:
    """Check that a specification lists no module twice.

    Raises:
        CorruptAdapterError: If it does.
    """
    if len(set(targets)) != len(targets):
        again = next(path for at, path in enumerate(targets) if path in targets[:at])
        raise CorruptAdapterError(f"{where}: the specification lists {again!r:.80} twice; save both again")


def is_head(key: str, spec: AdapterSpec) -> bool:
    """Whether a tensor belongs to the head that `spec` lists."""
    return spec.task is not None and any(key.startswith(f"{head}.") for head in spec.task.head)


def check_heads(stored: Mapping[str, StoredTensor], spec: AdapterSpec, where: str) -> None:
    """Check that every listed head is there, and gives out as many numbers as the task has labels.

    Raises:
        CorruptAdapterError: If a head has no tensor, or labels and outputs disagree.
        UnsupportedAdapterError: If no linear layer is found in the head.
    """
    heads = spec.task.head if spec.task else ()
    for head in heads:
        if not any(key.startswith(f"{head}.") for key in stored):
            raise CorruptAdapterError(
                f"{where}: the specification lists the head {head!r}, the file lacks it; save both"
            )
    wanted = spec.task.outputs if spec.task else 0
    if heads and wanted and (found := head_outputs(heads, stored)) != wanted:
        raise CorruptAdapterError(
            f"{where}: the head {heads[0]!r} has {found} outputs, the task {wanted} labels; save both together"
        )


def head_outputs(heads: Sequence[str], stored: Mapping[str, StoredTensor]) -> int:
    """How many numbers a head gives out: the rows of its last linear layer.

    Raises:
        UnsupportedAdapterError: If no linear layer is found.
    """
    rows = {
        key.removesuffix(".weight"): tensor.shape[0]
        for key, tensor in stored.items()
        if any(key.startswith(f"{head}.") for head in heads) and key.endswith(".weight") and len(tensor.shape) == 2
    }
    if not rows:
        raise UnsupportedAdapterError(f"modules_to_save: no linear layer in {heads[0]!r}; graftory keeps linear heads")
    for last in _OUTPUT_LAYERS:
        found = [count for path, count in rows.items() if path.rpartition(".")[2] == last]
        if found:
            return min(found)
    return min(rows.values())


def dump(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as safetensors bytes, always the same for the same tensors."""
    from safetensors.torch import save

    plain = {key: tensors[key].detach().cpu().contiguous().clone() for key in sorted(tensors)}
    return save(plain, metadata={"format": "pt"})


def load(data: Bytes) -> dict[str, Tensor]:
    """The tensors of checked safetensors bytes, on the CPU."""
    from safetensors.torch import load as load_bytes

    loaded: dict[str, Tensor] = load_bytes(bytes(data))
    return loaded
