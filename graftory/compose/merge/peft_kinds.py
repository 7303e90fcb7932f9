"""The methods that PEFT runs as updates: what its `get_delta_weight` gives, as thin factors where there are such.

With tensors of float64 they are exact to float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from graftory.compose.merge.delta import Delta, whole
from graftory.compose.merge.originals import Originals
from graftory.config.peft import (
    AdaloraConfig,
    FourierftConfig,
    HraConfig,
    LohaConfig,
    LokrConfig,
    OftConfig,
    PeftConfig,
    VbloraConfig,
    VeraConfig,
)
from graftory.errors import MergeError

Tensors = Mapping[str, Tensor]
_ADALORA_EPSILON = 1e-5
"""What PEFT adds to the rank that it divides by."""


def adalora(config: AdaloraConfig, path: str, tensors: Tensors, _: Originals) -> Delta:
    """s B diag(E) A, s = alpha / (start rank + 1e-5): ranks that were taken away count in it."""
    a, b, e = _parts(path, tensors, AdaloraConfig.parts)
    return Delta(b * (config.alpha / (config.start_rank + _ADALORA_EPSILON)), a * e)


def loha(config: LohaConfig, path: str, tensors: Tensors, _: Originals) -> Delta:
    """s (A₁ B₁) ⊙ (A₂ B₂): products of columns with columns and of rows with rows, r² of them."""
    a1, b1, a2, b2 = _parts(path, tensors, LohaConfig.parts)
    scale, (d_out, r1), (r2, d_in) = config.scale_of(path), a1.shape, b2.shape
    if r1 * r2 > min(d_out, d_in):
        return whole((a1 @ b1) * (a2 @ b2) * scale)
    left = (a1[:, :, None] * a2[:, None, :]).flatten(1)
    return Delta(left * scale, (b1[:, None, :] * b2[None, :, :]).flatten(0, 1))


def lokr(config: LokrConfig, path: str, tensors: Tensors, _: Originals) -> Delta:
    """s C ⊗ D = s (C₁ ⊗ D₁)(C₂ ⊗ D₂) with C = C₁ C₂ and D = D₁ D₂."""
    first, second = _factors(f"{path}.lokr_w1", tensors), _factors(f"{path}.lokr_w2", tensors)
    left = torch.kron(first.left, second.left) * config.scale_of(path)
    return Delta(left, torch.kron(first.right, second.right))


def _factors(name: str, tensors: Tensors) -> Delta:
    if name in tensors:
        return whole(_wide(tensors[name]))
    a, b = _wide(tensors[f"{name}_a"]), _wide(tensors[f"{name}_b"])
    return Delta(a, b) if a.shape[1] <= min(a.shape[0], b.shape[1]) else whole(a @ b)


def vera(config: VeraConfig, path: str, tensors: Tensors, originals: Originals) -> Delta:
    """diag(b) B diag(d) A, of B the first d_out rows and of A the first d_in columns."""
    b, d = _parts(path, tensors, VeraConfig.parts)
    d_out, d_in = _shape(originals, path)
    if len(b) != d_out or len(d) != config.rank:
        raise MergeError(f"{path}: an update of ({len(b)}, ?) for a weight of {(d_out, d_in)}; are they of one base?")
    down, up = (_wide(tensors[name]).to(b.dtype) for name in VeraConfig.shared)
    return Delta(b[:, None] * up[:d_out], d[:, None] * down[:, :d_in])


def vblora(config: VbloraConfig, path: str, tensors: Tensors, _: Originals) -> Delta:
    """B A, put together from the bank: each piece is a mixture of the k vectors with the largest logits."""
    bank = _wide(tensors[VbloraConfig.shared[0]])
    a, b = (_pieces(logits, bank, config.topk) for logits in _parts(path, tensors, VbloraConfig.parts))
    return Delta(b.transpose(1, 2).flatten(0, 1), a.flatten(1))


def _pieces(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """[m, n, vectors] to [m, n, length]."""
    largest, chosen = logits.topk(topk, dim=-1)
    return (largest.softmax(-1)[..., None] * bank[chosen]).sum(-2)


def fourierft(config: FourierftConfig, path: str, tensors: Tensors, originals: Originals) -> Delta:
    """The real part of the inverse transform of n coefficients at places drawn from the seed, times the scaling."""
    (spectrum,) = _parts(path, tensors, FourierftConfig.parts)
    shape = _shape(originals, path)
    draw = torch.Generator().manual_seed(config.location_seed)
    places = torch.randperm(shape[0] * shape[1], generator=draw)[: len(spectrum)]
    dense = spectrum.new_zeros(shape[0] * shape[1])
    dense[places] = spectrum
    return whole(torch.fft.ifft2(dense.view(shape)).real * config.scaling)


def oft(config: OftConfig, path: str, tensors: Tensors, originals: Originals) -> Delta:
    """W (Rᵀ − 1), R the blocks that rotate what the module reads."""
    weight = originals(path).weight
    (vectors,) = _parts(path, tensors, OftConfig.parts)
    size = _block_size(vectors.shape[1])
    if weight.shape[1] != size * (weight.shape[1] // size) or len(vectors) not in (1, weight.shape[1] // size):
        raise MergeError(f"{path}: {len(vectors)} blocks of {size} for a weight of {tuple(weight.shape)}; of one base?")
    blocks = _rotations(config, vectors.double(), size).expand(weight.shape[1] // size, size, size)
    turned = torch.einsum("onk,njk->onj", weight.double().unflatten(1, (-1, size)), blocks).flatten(1)
    return whole((turned - weight.double()).to(vectors.dtype))


def _rotations(config: OftConfig, vectors: Tensor, size: int) -> Tensor:
    """R of each block [n, size, size]: (1 − Q)(1 + Q)⁻¹, or terms of the series of (1 + Q)(1 − Q)⁻¹, as in PEFT."""
    skew = vectors.new_zeros(len(vectors), size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = vectors
    skew = skew - skew.transpose(1, 2)
    if config.constrained:
        most = config.eps / len(vectors) ** 0.5
        norms = torch.linalg.matrix_norm(skew, keepdim=True)
        skew = torch.where(norms <= most, skew, skew * (most / norms.clamp(min=1e-38)))
    one = torch.eye(size, dtype=skew.dtype)
    if not config.neumann:
        exact: Tensor = torch.linalg.solve(one + skew, (one - skew).expand_as(skew), left=False)
        return exact
    total: Tensor = one.expand_as(skew)
    # 1 + 2 Q + 2 Q² + … and the last power once; PEFT makes of 3 terms what it makes of 4
    last = 3 if config.neumann_terms == 3 else config.neumann_terms - 1
    power = total
    for number in range(1, last + 1):
        power = power @ skew
        total = total + (power if number == last > 1 else 2 * power)
    return total


def _block_size(numbers: int) -> int:
    """b of b (b − 1) / 2."""
    return (1 + math.isqrt(1 + 8 * numbers)) // 2


def hra(config: HraConfig, path: str, tensors: Tensors, originals: Originals) -> Delta:
    """W (H − 1) with H = Π (1 − 2 u uᵀ), or 1 − 2 U Uᵀ with orthogonal u: r products of a column and a row."""
    weight = originals(path).weight
    (vectors,) = _parts(path, tensors, HraConfig.parts)
    if vectors.shape[0] != weight.shape[1]:
        raise MergeError(
            f"{path}: {tuple(vectors.shape)} reflections for a weight of {tuple(weight.shape)}; of one base?"
        )
    units = vectors.double() / vectors.double().norm(dim=0)
    if config.orthogonal:
        units = _orthogonal(vectors.double())
    columns: list[Tensor] = []
    for number in range(units.shape[1]):
        read = weight.double() @ units[:, number]
        for earlier, column in enumerate(columns):
            read = read + column * (units[:, earlier] @ units[:, number])
        columns.append(-2 * read)
    return Delta(torch.stack(columns, dim=1).to(vectors.dtype), units.T.to(vectors.dtype))


def _orthogonal(vectors: Tensor) -> Tensor:
    """The columns by Gram and Schmidt, as PEFT does it, so that signs are its own."""
    units: list[Tensor] = []
    for column in vectors.T:
        left = column
        for unit in units:
            left = left - (unit @ left) * unit
        units.append(left / left.norm())
    return torch.stack(units, dim=1)


def _parts(path: str, tensors: Tensors, parts: Sequence[str]) -> list[Tensor]:
    return [_wide(tensors[f"{path}.{part}"]) for part in parts]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _shape(originals: Originals, path: str) -> tuple[int, int]:
    rows, columns = originals(path).weight.shape
    return int(rows), int(columns)


def present(config: PeftConfig, tensors: Tensors) -> list[str]:
    """The names of all tensors that an adapter of these has; what is at a module is one of the method's forms."""
    names = list(config.shared)
    for path in config.targets:
        there = tuple(part for part in config.parts if f"{path}.{part}" in tensors)
        names += [f"{path}.{part}" for part in (there if there in config.forms else config.forms[0])]
    return names


PEFT_DELTAS: Mapping[type[PeftConfig], Callable[..., Delta]] = {
    AdaloraConfig: adalora,
    LohaConfig: loha,
    LokrConfig: lokr,
    VeraConfig: vera,
    VbloraConfig: vblora,
    FourierftConfig: fourierft,
    OftConfig: oft,
    HraConfig: hra,
}
"""(configuration, path, tensors, the base's modules) -> the update; LN tuning changes norms, and has none."""

LOOK_AT_BASE = (VeraConfig, FourierftConfig, OftConfig, HraConfig)
"""Those that need the base: for its weights, or for the widths of its modules."""
