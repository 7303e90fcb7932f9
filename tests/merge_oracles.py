"""Merging by the book on dense matrices in float64, which knows nothing of factors, cores or blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.config import LoraConfig
from tests.test_compose_merge import delta

Oracle = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
"""Updates and weights to what they merge to."""


def regauged(adapter: Adapter, seed: int = 0) -> Adapter:
    """The adapter with (B G, G⁻¹ A) for (B, A) at every site: other tensors, the same update."""
    config = adapter.spec.config
    assert isinstance(config, LoraConfig)
    generator, tensors = torch.Generator().manual_seed(seed), dict(adapter.tensors)
    for path in config.targets:
        a, b = (tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
        gauge = torch.randn(len(a), len(a), generator=generator, dtype=torch.float64) + 2 * torch.eye(len(a))
        tensors[f"{path}.lora_A.weight"] = (torch.linalg.inv(gauge) @ a).float()
        tensors[f"{path}.lora_B.weight"] = (b @ gauge).float()
    return replace(adapter, tensors=tensors)


def deltas(adapters: Sequence[Adapter], path: str) -> list[Tensor]:
    """The updates of those that sit at a module, each [d_out, d_in]."""
    return [delta(adapter, path) for adapter in adapters if path in adapter.spec.config.targets]


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    """By a full SVD."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    best: Tensor = u[:, :rank] * s[:rank] @ vt[:rank]
    return best


def trim(matrix: Tensor, density: float) -> Tensor:
    """The largest entries, by sorting all."""
    order = matrix.abs().flatten().argsort(descending=True)[: int(density * matrix.numel())]
    kept = torch.zeros(matrix.numel(), dtype=torch.bool)
    kept[order] = True
    return matrix * kept.reshape(matrix.shape)


def elect(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES' election and disjoint mean, an entry at a time."""
    merged = torch.zeros(matrices[0].numel(), dtype=torch.float64)
    for index, entries in enumerate(zip(*(matrix.flatten().tolist() for matrix in matrices), strict=True)):
        values = list(zip(weights, entries, strict=True))
        sign = sum(weight * value for weight, value in values)
        agree = [(weight, value) for weight, value in values if weight * value * sign > 0]
        if agree:
            merged[index] = sum(w * v for w, v in agree) / sum(abs(w) for w, _ in agree)
    return merged.reshape(matrices[0].shape)


def ties(matrices: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim, elect, merge."""
    return elect([trim(matrix, density) for matrix in matrices], weights)


def triplets(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a full SVD, those that are not 0."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    count = int((s > 1e-5 * s[0]).sum())
    return u[:, :count], s[:count], vt[:count]


def whitened(columns: Tensor) -> Tensor:
    """X (XᵀX)^-½, which is the polar factor of a matrix of full rank, by the eigenvalues of XᵀX."""
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    orthonormal: Tensor = columns @ (vectors * values.rsqrt() @ vectors.T)
    return orthonormal


def tsv(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TSV-M on whole matrices."""
    found = [triplets(matrix) for matrix in matrices]
    u = whitened(torch.cat([one[0] for one in found], dim=1))
    v = whitened(torch.cat([one[2] for one in found]).T)
    return u * torch.cat([weight * one[1] for weight, one in zip(weights, found, strict=True)]) @ v.T


def iso_c(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Iso-C on whole matrices."""
    u, s, vt = triplets(weighted(matrices, weights))
    return s.mean() * u @ vt


def iso_cts(matrices: Sequence[Tensor], weights: Sequence[float], common: float) -> Tensor:
    """Iso-CTS on whole matrices."""
    u, s, vt = triplets(weighted(matrices, weights))
    each = round((1 - common) * len(s) / len(matrices))
    kept = len(s) - each * len(matrices)
    left, values, right = [u[:, :kept]], [s[:kept]], [vt[:kept]]
    for matrix, weight in zip(matrices, weights, strict=True):
        own = triplets((torch.eye(len(matrix)) - u[:, :kept] @ u[:, :kept].T) @ (weight * matrix))
        left.append(own[0][:, :each])
        values.append(own[1][:each])
        right.append(own[2][:each])
    return torch.cat(values).mean() * whitened(torch.cat(left, dim=1)) @ whitened(torch.cat(right).T).T


def weighted(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_t Δ_t."""
    return torch.stack([weight * matrix for weight, matrix in zip(weights, matrices, strict=True)]).sum(0)


def knots(matrices: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """KnOTS-TIES on whole matrices."""
    u, s, vt = triplets(torch.cat(list(matrices), dim=1))
    blocks = [vt[:, n * matrices[0].shape[1] : (n + 1) * matrices[0].shape[1]] for n in range(len(matrices))]
    return u * s @ ties(blocks, weights, density)


def core(matrices: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES in the eigenbases of Σ (ΔΔᵀ)^½ and Σ (ΔᵀΔ)^½, from whole matrices."""
    found = [triplets(matrix) for matrix in matrices]
    rank = sum(len(one[1]) for one in found)
    left = torch.linalg.eigh(weighted([one[0] * one[1] @ one[0].T for one in found], [1.0] * len(found)))[1][:, -rank:]
    right = torch.linalg.eigh(weighted([one[2].T * one[1] @ one[2] for one in found], [1.0] * len(found)))[1][:, -rank:]
    merged: Tensor = left @ ties([left.T @ matrix @ right for matrix in matrices], weights, density) @ right.T
    return merged


def ctm(matrices: Sequence[Tensor], weights: Sequence[float], rank: int, density: float) -> Tensor:
    """CtM-TIES on whole matrices, the bases by eigenvalues of d x d matrices."""
    norms = [float(matrix.norm()) for matrix in matrices]
    mean = sum(norms) / len(norms)
    level = [one * (0.25 * norm + 0.75 * mean) / norm for one, norm in zip(matrices, norms, strict=True)]
    u = torch.linalg.eigh(weighted([one @ one.T for one in level], [1.0] * len(level)))[1][:, -rank:]
    for _ in range(300):
        v = torch.linalg.eigh(weighted([one.T @ u @ u.T @ one for one in level], [1.0] * len(level)))[1][:, -rank:]
        u = torch.linalg.eigh(weighted([one @ v @ v.T @ one.T for one in level], [1.0] * len(level)))[1][:, -rank:]
    merged: Tensor = u @ ties([u.T @ one @ v for one in level], weights, density) @ v.T
    return merged


def pico(matrices: Sequence[Tensor], weights: Sequence[float], merged_by: Oracle = weighted) -> Tensor:
    """Pico on whole matrices: U and σ² of the stacked balanced B are the eigenvectors and -values of Σ (ΔΔᵀ)^½."""
    roots = [one[0] * one[1] @ one[0].T for one in map(triplets, matrices)]
    values, vectors = torch.linalg.eigh(weighted(roots, [1.0] * len(roots)))
    held = 1 / (1 + (len(matrices) - 1) * values.clamp(min=0) / values.clamp(min=0).sum())
    merged = merged_by([vectors * held @ vectors.T @ matrix for matrix in matrices], weights)
    wanted: Tensor = torch.stack([matrix.norm() for matrix in matrices]).mean()
    scaled: Tensor = merged * (wanted / merged.norm())
    return scaled


def ctm_at_defaults(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """With the largest of their ranks."""
    return ctm(matrices, weights, max(len(triplets(matrix)[1]) for matrix in matrices), 0.2)


ORACLES: Mapping[str, Oracle] = {
    "linear": weighted,
    "ties": lambda matrices, weights: ties(matrices, weights, 0.2),
    "magnitude": lambda matrices, weights: weighted([trim(matrix, 0.2) for matrix in matrices], weights),
    "tsv": tsv,
    "iso_c": iso_c,
    "iso_cts": lambda matrices, weights: iso_cts(matrices, weights, 0.8),
    "knots": lambda matrices, weights: knots(matrices, weights, 0.2),
    "core": lambda matrices, weights: core(matrices, weights, 0.2),
    "ctm": ctm_at_defaults,
    "pico": pico,
}
"""What each method gives at its defaults, for what does not draw."""
