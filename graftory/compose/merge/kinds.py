"""How an adapter of each linear method is written as updates: a row a method, one function each.

What is not linear has no ΔW and no row here. A new method brings one function

    (config, path, tensors, originals) -> Delta

of its own configuration class, one of its targets, all tensors of the adapter but the head's (by their names in
`Adapter.tensors`), and the base's modules. The function must be exact in the type of those tensors, float32 to merge
and float64 to fold, and must not multiply factors out where it need not. `originals(path)` gives W and b; a method
that asks for them says so in `needs_base`, so that callers know that a base has to be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graftory.compose.merge.base import Body, check_keys
from graftory.compose.merge.delta import Delta, Scaling, of_bias, total
from graftory.compose.merge.originals import Original, Originals
from graftory.compose.merge.peft_kinds import LOOK_AT_BASE, PEFT_DELTAS, present
from graftory.config import (
    AdapterConfig,
    BitfitConfig,
    DoraConfig,
    Ia3Config,
    KronaConfig,
    LoraBiasConfig,
    LoraConfig,
    LowRankConfig,
    SparsePlace,
    SparseUpdateConfig,
    UpdateConfig,
)
from graftory.errors import MergeError

_BLOCK = 1 << 22
"""Most numbers of a matrix that are made at a time."""


def own_keys(config: AdapterConfig) -> list[str]:
    """Every part at every target."""
    return [f"{path}.{part}" for path in config.targets for part in config.parts]


def _never(_: Any) -> bool:
    return False


def _always(_: Any) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Kind:
    """A row: how adapters of one method become updates. `Any` stands for the method's own configuration class."""

    delta: Callable[[Any, str, Mapping[str, Tensor], Originals], Delta]
    """(configuration, path of a target, tensors of the body, the base's modules) -> the update there."""
    keys: Callable[[Any], Sequence[str]] = own_keys
    """The names of all tensors that a body has; others are refused."""
    needs_base: Callable[[Any], bool] = _never
    """Whether the update depends on the base's weights."""
    present: Callable[[Any, Mapping[str, Tensor]], Sequence[str]] | None = None
    """What goes before `keys` where the tensors themselves say which there are."""


def lora(config: LowRankConfig, path: str, tensors: Mapping[str, Tensor], _: Originals) -> Delta:
    """s B A as (s B, A): rank, alpha, rsLoRA and patterns are all in the scale s."""
    a, b = (tensors[f"{path}.lora_{side}.weight"] for side in "AB")
    return Delta(b * config.scale_of(path), a)


def lora_bias(config: LoraBiasConfig, path: str, tensors: Mapping[str, Tensor], originals: Originals) -> Delta:
    """s B A, and Δb = s c + b' − b with the parts that are there."""
    vectors = []
    for part in config.parts_at(path)[0 if path in config.bias_only else 2 :]:
        vector = tensors[f"{path}.{part}"]
        if part == config.parts[2]:
            vectors.append(vector * config.scale_of(path))
            continue
        base = originals(path).bias
        if base is None or base.shape != vector.shape:
            raise MergeError(f"{path}: a bias of {tuple(vector.shape)} that the base lacks; are they of one base?")
        vectors.append((vector.double() - base.double()).to(vector.dtype))
    bias = torch.stack(vectors).sum(0) if vectors else None
    if path in config.bias_only:
        assert bias is not None
        return of_bias(bias)
    return replace(lora(config, path, tensors, originals), bias=bias)


def dora(config: DoraConfig, path: str, tensors: Mapping[str, Tensor], originals: Originals) -> Delta:
    """D (W + s B A) − W = (D − I) W + (D s B) A with D = diag(m / n), n the norms of the rows of W + s B A."""
    weight = _fitting(originals(path), path, *_sides(path, tensors)).weight
    a, b = (tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
    b = b * config.scale_of(path)
    step = max(1, _BLOCK // weight.shape[1])
    norms = torch.cat(
        [
            torch.linalg.vector_norm(weight[start : start + step].double() + b[start : start + step] @ a, dim=1)
            for start in range(0, weight.shape[0], step)
        ]
    )
    magnitude = tensors[f"{path}.{DoraConfig.parts[2]}"]
    factors = magnitude.double() / norms
    rows, left, right = (each.to(magnitude.dtype) for each in (factors - 1, factors[:, None] * b, a))
    return Delta(left, right, Scaling(weight, rows, rows.new_zeros(weight.shape[1])))


def ia3(config: Ia3Config, path: str, tensors: Mapping[str, Tensor], originals: Originals) -> Delta:
    """diag(l − 1) W and (l − 1) b where what the module returns is scaled, W diag(l − 1) where what it reads is."""
    given = tensors[f"{path}.{Ia3Config.parts[0]}"].flatten()
    vector = given.double() - 1
    original = originals(path)
    d_out, d_in = original.weight.shape
    reads = path in config.feedforward
    _fitting(original, path, *((None, len(vector)) if reads else (len(vector), None)))
    more = vector.to(given.dtype)
    none = more.new_zeros(d_out if reads else d_in)
    scaling = Scaling(original.weight, *((none, more) if reads else (more, none)))
    bias = None if reads or original.bias is None else (vector * original.bias.double()).to(given.dtype)
    return Delta(more.new_zeros(d_out, 0), more.new_zeros(0, d_in), scaling, bias)


def update(config: UpdateConfig, path: str, tensors: Mapping[str, Tensor], originals: Originals) -> Delta:
    """B A + diag(p) W + W diag(q), and Δb."""
    bias = tensors[f"{path}.bias_delta"]
    if path in config.bias_only:
        return of_bias(bias)
    a, b = (tensors[f"{path}.lora_{side}.weight"] for side in "AB")
    rows, columns = (tensors[f"{path}.{side}_scale"] for side in ("row", "column"))
    if not (bool(rows.any()) or bool(columns.any())):
        return Delta(b, a, bias=bias)
    weight = _fitting(originals(path), path, *_sides(path, tensors)).weight
    return Delta(b, a, Scaling(weight, rows, columns), bias)


def bitfit(_config: BitfitConfig, path: str, tensors: Mapping[str, Tensor], _: Originals) -> Delta:
    """δ of a linear layer or a norm."""
    return of_bias(tensors[f"{path}.{BitfitConfig.parts[0]}"])


def krona(config: KronaConfig, path: str, tensors: Mapping[str, Tensor], _: Originals) -> Delta:
    """s A ⊗ B = (s L_A ⊗ L_B)(R_A ⊗ R_B), where A = L_A R_A and B = L_B R_B with the thinner side left as it is."""
    (left_a, right_a), (left_b, right_b) = (_thin(tensors[f"{path}.{part}"]) for part in KronaConfig.parts)
    return Delta(config.strength * torch.kron(left_a, left_b), torch.kron(right_a, right_b))


def sparse_update(config: SparseUpdateConfig, path: str, tensors: Mapping[str, Tensor], originals: Originals) -> Delta:
    """S, exactly, and s B A beside it where there is one."""
    place, lora_of = config.place_of(path), config.low_rank
    index, value = config.parts[:2]
    parts = [] if place is None else [entries(place, tensors[f"{path}.{index}"], tensors[f"{path}.{value}"])]
    if lora_of is not None and path in lora_of.targets:
        parts.append(lora(lora_of, path, tensors, originals))
    if not parts:
        raise MergeError(f"{path}: neither entries nor a LoRA, so there is no update; train the adapter first")
    return total(parts, [1.0] * len(parts))


def entries(place: SparsePlace, index: Tensor, value: Tensor) -> Delta:
    """S as E R, R its rows that are not empty and E the columns of the identity for them; or by columns, if they are
    fewer: as wide as it has to be, and no number of S is rounded."""
    by_row = index.long().div(place.inputs, rounding_mode="floor"), index.long() % place.inputs
    (rows, own_row), (columns, own_column) = (each.unique(return_inverse=True) for each in by_row)
    if len(rows) <= len(columns):
        right = value.new_zeros(len(rows), place.inputs).index_put((own_row, by_row[1]), value)
        return Delta(_picking(rows, place.outputs, value), right)
    left = value.new_zeros(place.outputs, len(columns)).index_put((by_row[0], own_column), value)
    return Delta(left, _picking(columns, place.inputs, value).T)


def _picking(chosen: Tensor, size: int, like: Tensor) -> Tensor:
    """Columns of the identity, [size, chosen]."""
    one = like.new_zeros(size, len(chosen))
    one[chosen, torch.arange(len(chosen))] = 1
    return one


KINDS: Mapping[type[AdapterConfig], Kind] = {
    LoraConfig: Kind(lora),
    LoraBiasConfig: Kind(
        lora_bias,
        keys=lambda config: [f"{path}.{part}" for path in config.targets for part in config.parts_at(path)],
        needs_base=lambda config: bool(config.biases),
    ),
    DoraConfig: Kind(dora, needs_base=_always),
    Ia3Config: Kind(ia3, needs_base=_always),
    BitfitConfig: Kind(bitfit),
    KronaConfig: Kind(krona),
    SparseUpdateConfig: Kind(
        sparse_update,
        keys=lambda config: [f"{path}.{part}" for path in config.targets for part in config.parts_at(path)],
    ),
    UpdateConfig: Kind(
        update,
        keys=lambda config: [f"{path}.{part}" for path in config.targets for part in config.parts_at(path)],
        needs_base=lambda config: config.rows or config.columns,
    ),
    **{
        config: Kind(delta, needs_base=_always if config in LOOK_AT_BASE else _never, present=present)
        for config, delta in PEFT_DELTAS.items()
    },
}
"""Every linear method, by its configuration."""

LINEAR_METHODS = tuple(kind.method for kind in KINDS)
"""Adapter methods that methods in delta space accept."""


def check_linear(body: Body) -> Kind:
    """The row of an adapter, whose tensors are all there and all explained.

    Raises:
        MergeError: If the method is not linear, or a tensor is missing or unexplained.
    """
    kind = KINDS.get(type(body.config))
    if kind is None:
        raise MergeError(f"{body.name}: a {body.config.method} adapter is no change of weights and has no update")
    check_keys(body, kind.present(body.config, body.tensors) if kind.present else kind.keys(body.config))
    return kind


def delta_at(body: Body, path: str) -> Delta:
    """The update of one adapter at one of its targets, in fp32."""
    return delta_in(torch.float32, body.config, path, body.tensors, body.originals)


def delta_in(
    dtype: torch.dtype, config: AdapterConfig, path: str, tensors: Mapping[str, Tensor], originals: Originals
) -> Delta:
    """The same in another type, for a configuration and its tensors."""
    return KINDS[type(config)].delta(config, path, _Typed(tensors, dtype), originals)


class _Typed(Mapping[str, Tensor]):
    """Tensors of another type, converted as they are asked for: a module asks for few of them. Positions stay whole."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._tensors, self._dtype = tensors, dtype

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._tensors[key]
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _thin(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors of a matrix, one of them the identity."""
    rows, columns = matrix.shape
    one = torch.eye(min(rows, columns), dtype=matrix.dtype)
    return (one, matrix) if rows < columns else (matrix, one)


def _sides(path: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    return tensors[f"{path}.lora_B.weight"].shape[0], tensors[f"{path}.lora_A.weight"].shape[1]


def _fitting(original: Original, path: str, d_out: int | None, d_in: int | None) -> Original:
    got, wanted = tuple(original.weight.shape), (d_out, d_in)
    if any(want is not None and have != want for have, want in zip(got, wanted, strict=True)):
        raise MergeError(f"{path}: an update of {wanted} for a weight of {got}; are they of one base model?")
    return original
