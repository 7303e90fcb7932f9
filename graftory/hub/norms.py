"""Norms and distances of stored tensors in float64, by numpy, and of LoRA updates from their factors alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftory.errors import CorruptAdapterError
from graftory.hub.codecs.packed import unpacked
from graftory.hub.codecs.peft import own_name
from graftory.hub.depot import Depot
from graftory.hub.records import Record
from graftory.hub.safetensors_header import Bytes, StoredTensor, read_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I32": "<i4"}


@dataclass(frozen=True, slots=True)
class Distance:
    """How far apart two vectors are. A number that is not finite, or divided by zero, is None.

    Attributes:
        left: Norm of the first.
        right: Norm of the second.
        distance: Norm of their difference.
        relative: `distance` by `left`.
        cosine: Cosine of the angle between them.
    """

    left: float | None
    right: float | None
    distance: float | None
    relative: float | None
    cosine: float | None


@dataclass(frozen=True, slots=True)
class Apart:
    """Two vectors, by their norms, the norm of their difference and their inner product."""

    left: float
    right: float
    distance: float
    inner: float

    @classmethod
    def joined(cls, parts: Iterable[Apart]) -> Apart:
        """Two vectors from their parts."""
        parts = list(parts)
        norms = [math.hypot(*values) for values in zip(*((p.left, p.right, p.distance) for p in parts), strict=True)]
        return cls(norms[0], norms[1], norms[2], sum(part.inner for part in parts))

    def measured(self) -> Distance:
        """The same with what follows from it, and without what is no number."""
        scale = self.left * self.right
        return Distance(
            left=_finite(self.left),
            right=_finite(self.right),
            distance=_finite(self.distance),
            relative=_finite(self.distance / self.left) if self.left else None,
            cosine=_finite(max(-1.0, min(1.0, self.inner / scale))) if scale and math.isfinite(self.inner) else None,
        )


@dataclass(frozen=True, slots=True)
class Update:
    """A LoRA update s B A, kept as its factors: the matrix itself, as large as a layer, is never made."""

    down: Matrix
    up: Matrix

    @property
    def outer(self) -> tuple[int, int]:
        """The shape of the matrix: [out, in]."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """The rows of A."""
        return len(self.down)

    def norm(self) -> float:
        """Frobenius norm of the update.

        With B = Q R and Aᵀ = P S it is ‖R Sᵀ‖, r x r; the same as √tr((A Aᵀ)(Bᵀ B)), without squaring first,
        which would leave half of the digits where two updates nearly cancel.
        """
        import numpy as np

        up, down = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (self.up, self.down.T))
        return float(np.linalg.norm(up @ down.T))

    def minus(self, other: Update) -> Update:
        """The difference, with the ranks added."""
        import numpy as np

        return Update(np.concatenate([self.down, other.down]), np.concatenate([self.up, -other.up], axis=1))

    def inner(self, other: Update) -> float:
        """Inner product of two updates: the sum over (Bᵀ B') ∘ (A A'ᵀ), r x r'."""
        return float(((self.up.T @ other.up) * (self.down @ other.down.T)).sum())


class Values:
    """The tensors of one version in float64, each read from the mapped file when it is asked for."""

    def __init__(self, depot: Depot, record: Record) -> None:
        self._ref = record.ref
        self._files: list[Bytes] = []
        self._tensors: dict[str, tuple[int, StoredTensor]] = {}
        stored = {entry.path: depot.blobs.map(entry.sha256, f"{record.ref} {entry.path}") for entry in record.files}
        for path, data in unpacked(record.spec, stored)[1].items():
            if path.endswith(".safetensors"):
                for tensor in read_header(data, path):
                    self._tensors[own_name(tensor.name)] = (len(self._files), tensor)
                self._files.append(data)

    def __getitem__(self, name: str) -> Matrix:
        """One tensor, by its name in the record.

        Raises:
            CorruptAdapterError: If the files lack it.
        """
        import numpy as np

        if name not in self._tensors:
            raise CorruptAdapterError(f"{self._ref}: its files lack the tensor {name!r}; pull it again")
        number, tensor = self._tensors[name]
        raw = memoryview(self._files[number])[tensor.begin : tensor.end]
        if tensor.dtype == "BF16":  # the upper half of a float32
            plain = (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
        elif tensor.dtype == "U8":  # bytes of bits: how many of them differ is what tells two apart
            return np.unpackbits(np.frombuffer(raw, dtype=np.uint8)).astype(np.float64)
        else:
            plain = np.frombuffer(raw, dtype=_NUMPY[tensor.dtype])
        return plain.astype(np.float64).reshape(tensor.shape)

    def update(self, path: str, scale: float) -> Update:
        """The LoRA update of one module."""
        return Update(self[f"{path}.lora_A.weight"], scale * self[f"{path}.lora_B.weight"])


def between(left: Matrix, right: Matrix) -> Distance:
    """How far apart two tensors of one shape are."""
    import numpy as np

    with np.errstate(invalid="ignore", over="ignore"):
        norms = [float(np.linalg.norm(tensor.ravel())) for tensor in (left, right, left - right)]
        return Apart(norms[0], norms[1], norms[2], float(np.vdot(left, right))).measured()


def between_updates(left: Update | None, right: Update | None) -> Apart:
    """How far apart the updates of one module are; None for a module that a side leaves as it is."""
    import numpy as np

    with np.errstate(invalid="ignore", over="ignore"):
        if left is None or right is None:
            norms = [0.0 if side is None else side.norm() for side in (left, right)]
            return Apart(norms[0], norms[1], max(norms), 0.0)
        return Apart(left.norm(), right.norm(), left.minus(right).norm(), left.inner(right))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
