"""How much updates get in each other's way, module by module. No model is needed; inputs may be given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.compose.merge.base import Body, body_of
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.dense import stack_of_deltas
from graftory.compose.merge.heads import common_base
from graftory.compose.merge.kinds import LINEAR_METHODS, check_linear, delta_at
from graftory.compose.merge.originals import Originals, no_originals, originals_of
from graftory.compose.merge.spectrum import Spectrum, spectrum
from graftory.errors import MergeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOTHING = 1e-6
"""Entries below this share of an update's largest are rounding and have no sign, updates below this share of another's
size are rounding and have no direction."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two updates of one module.

    Attributes:
        first: An adapter.
        second: Another one.
        sign_conflict: Of the entries that both change, the share with opposite signs; 0 if there are none.
        write_overlap: The mean cos² of the principal angles between what they write, the column spaces of B.
        read_overlap: The same of what they read, the row spaces of A. 0: orthogonal; 1: one space holds the other.
        cosine: ⟨Δ_1, Δ_2⟩ / (‖Δ_1‖ ‖Δ_2‖).
        norm_ratio: ‖Δ_1‖ / ‖Δ_2‖; None if the second is 0.
    """

    first: str
    second: str
    sign_conflict: float
    write_overlap: float
    read_overlap: float
    cosine: float
    norm_ratio: float | None


@dataclass(frozen=True, slots=True)
class Effect:
    """What the merged update does in place of one adapter's, to the inputs of that adapter.

    With X the inputs, Y = Δ_merged X and Y_t = Δ_t X. Without inputs X is a basis of what the adapter reads.

    Attributes:
        adapter: The adapter.
        error: ‖Y − Y_t‖ / ‖Y_t‖, the activation-weighted error where inputs are given; None if Y_t is 0.
        agreement: ⟨Y, Y_t⟩ / (‖Y‖ ‖Y_t‖), which no scale changes: 1 if it does the same, 0 if something else.
    """

    adapter: str
    error: float | None
    agreement: float


@dataclass(frozen=True, slots=True)
class Place:
    """One module.

    Attributes:
        path: The module.
        pairs: Every two adapters that sit there.
        effects: Each adapter that sits there.
    """

    path: str
    pairs: tuple[Pair, ...]
    effects: tuple[Effect, ...]


@dataclass(frozen=True, slots=True)
class Interference:
    """All modules, and what they sum up to.

    Attributes:
        places: By module.
        pairs: Means over the modules where both sit, each pair once.
        effects: Over all modules together, sums of squares before the quotient.
        by_inputs: Whether effects are over inputs; else over what each adapter reads.
    """

    places: tuple[Place, ...]
    pairs: tuple[Pair, ...]
    effects: tuple[Effect, ...]
    by_inputs: bool


@dataclass(frozen=True, slots=True)
class _Sums:
    """‖Y − Y_t‖², ‖Y_t‖², ‖Y‖², ⟨Y, Y_t⟩."""

    apart: float
    own: float
    merged: float
    product: float

    def effect(self, adapter: str) -> Effect:
        if self.own == 0:
            return Effect(adapter, None, 1.0 if self.merged == 0 else 0.0)
        gone = self.merged <= _NOTHING**2 * self.own
        agreement = 0.0 if gone else self.product / math.sqrt(self.own * self.merged)
        return Effect(adapter, math.sqrt(self.apart / self.own), agreement)


def interference(
    adapters: Mapping[str, Adapter],
    merged: Adapter,
    inputs: Sequence[Mapping[str, Tensor]] = (),
    *,
    base: PreTrainedModel | None = None,
) -> Interference:
    """Compare the updates ΔW of adapters with each other, and with what they were merged to. Biases are left out.

    Args:
        adapters: By name, of linear methods and one base.
        merged: What they were merged to.
        inputs: What each reads at its sites, in the order of the adapters (`record_inputs`).
        base: The plain base model, for adapters that scale its own weights (`needs_base`).

    Raises:
        MergeError: If one is not linear, so that it has no update of a weight, none changes a weight, or shapes
            disagree.
    """
    if inputs and len(inputs) != len(adapters):
        raise MergeError(f"got inputs of {len(inputs)} for {len(adapters)} adapters, wanted one each")
    everyone = {**adapters, "the merged adapter": merged}
    _check(everyone)
    common = common_base([adapter.spec.base for adapter in everyone.values()])
    originals = no_originals if base is None else originals_of(base, common)
    updates = {
        name: _Updates(adapter, number, inputs[number] if inputs and number < len(adapters) else {}, originals)
        for number, (name, adapter) in enumerate(everyone.items())
    }
    whole = updates.pop("the merged adapter")
    sums: dict[str, list[_Sums]] = {name: [] for name in adapters}
    places = []
    for path in dict.fromkeys(path for one in updates.values() for path in one.paths):
        here = {name: delta for name, one in updates.items() if (delta := one.at(path)) is not None}
        if not here:
            continue
        spectra = [spectrum(delta) for delta in here.values()]
        result = whole.at(path)
        for (name, delta), own in zip(here.items(), spectra, strict=True):
            x = updates[name].inputs[path].double().T if path in updates[name].inputs else own.vt.T
            sums[name].append(_sums(result, delta, x))
        effects = tuple(sums[name][-1].effect(name) for name in here)
        places.append(Place(path, _pairs(here, spectra), effects))
    if not places:
        raise MergeError("none of the adapters changes a weight, so there is nothing to compare")
    return Interference(
        tuple(places),
        _mean_pairs([pair for place in places for pair in place.pairs]),
        tuple(_total(ones).effect(name) for name, ones in sums.items()),
        bool(inputs),
    )


class _Updates:
    """The updates of one adapter, made module by module."""

    def __init__(self, adapter: Adapter, number: int, inputs: Mapping[str, Tensor], originals: Originals) -> None:
        self.body: Body = body_of(adapter, number, inputs, originals)
        check_linear(self.body)
        self.paths = tuple(self.body.config.targets)
        self.inputs = inputs

    def at(self, path: str) -> Delta | None:
        """The update there as factors; None if it changes no weight."""
        if path not in self.paths:
            return None
        delta = delta_at(self.body, path)
        return replace(delta.factored(), bias=None) if delta.changes_weight else None


def _check(adapters: Mapping[str, Adapter]) -> None:
    for name, adapter in adapters.items():
        if adapter.spec.method not in LINEAR_METHODS:
            raise MergeError(
                f"{name} is a {adapter.spec.method} adapter, which has no update of a weight to compare; a merge "
                f"report takes {', '.join(LINEAR_METHODS)}"
            )


def _pairs(here: Mapping[str, Delta], spectra: Sequence[Spectrum]) -> tuple[Pair, ...]:
    names = list(here)
    conflicts = sign_conflicts(list(here.values()))
    found = []
    for i, j in combinations(range(len(names)), 2):
        one, other = spectra[i], spectra[j]
        product = float(torch.einsum("k,kl,l,kl->", one.s, one.u.T @ other.u, other.s, one.vt @ other.vt.T))
        sizes = float(one.s.norm()), float(other.s.norm())
        found.append(
            Pair(
                names[i],
                names[j],
                conflicts[i, j],
                overlap(one.u, other.u),
                overlap(one.vt.T, other.vt.T),
                product / (sizes[0] * sizes[1]) if all(sizes) else 0.0,
                sizes[0] / sizes[1] if sizes[1] else None,
            )
        )
    return tuple(found)


def overlap(first: Tensor, second: Tensor) -> float:
    """Mean cos² of the principal angles of two spaces: ‖UᵀV‖² over the smaller dimension, U and V orthonormal bases.

    Args:
        first: [d, k], orthonormal columns.
        second: [d, l].
    """
    fewer = min(first.shape[1], second.shape[1])
    return float((first.T @ second).square().sum()) / fewer if fewer else 0.0


def sign_conflicts(deltas: Sequence[Delta]) -> dict[tuple[int, int], float]:
    """Of every two updates, the share of opposite signs among the entries that both change.

    ΔW is made in blocks of rows, twice: what is rounding shows beside the largest entry only.
    """
    stack = stack_of_deltas(deltas)
    largest = torch.zeros(len(deltas))
    for block in stack.blocks():
        largest = torch.maximum(largest, block.abs().flatten(1).amax(1))
    both, against = torch.zeros(2, len(deltas), len(deltas), dtype=torch.float64)
    for block in stack.blocks():
        flat = block.flatten(1)
        signs = torch.where(flat.abs() > _NOTHING * largest[:, None], flat.sign(), 0)
        together = signs.abs() @ signs.abs().T
        both += together.double()
        against += ((together - signs @ signs.T) / 2).double()
    return {
        (i, j): float(against[i, j] / both[i, j]) if both[i, j] else 0.0 for i, j in combinations(range(len(deltas)), 2)
    }


def _sums(merged: Delta | None, delta: Delta, x: Tensor) -> _Sums:
    """What two updates do to inputs [d_in, n]."""
    own = delta.left.double() @ (delta.right.double() @ x)
    its = torch.zeros_like(own) if merged is None else merged.left.double() @ (merged.right.double() @ x)
    squares = (its - own).square().sum(), own.square().sum(), its.square().sum(), (its * own).sum()
    return _Sums(*(float(square) for square in squares))


def _total(sums: Sequence[_Sums]) -> _Sums:
    return _Sums(
        sum(one.apart for one in sums),
        sum(one.own for one in sums),
        sum(one.merged for one in sums),
        sum(one.product for one in sums),
    )


def _mean_pairs(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    grouped: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        grouped.setdefault((pair.first, pair.second), []).append(pair)
    found = []
    for (first, second), group in grouped.items():
        ratios = [pair.norm_ratio for pair in group if pair.norm_ratio]
        found.append(
            Pair(
                first,
                second,
                _mean([pair.sign_conflict for pair in group]),
                _mean([pair.write_overlap for pair in group]),
                _mean([pair.read_overlap for pair in group]),
                _mean([pair.cosine for pair in group]),
                math.exp(_mean([math.log(ratio) for ratio in ratios])) if ratios else None,
            )
        )
    return tuple(found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
