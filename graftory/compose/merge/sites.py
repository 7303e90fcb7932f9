"""What methods in delta space share: the updates of all adapters, module by module, whatever kinds they are of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graftory.compose.merge.base import Body, union_of_targets
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.kinds import LINEAR_METHODS, check_linear, delta_at
from graftory.compose.merge.merged import body_of_updates
from graftory.errors import MergeError

__all__ = ["LINEAR_METHODS", "Site", "Vectors", "as_rows", "averaged", "merge_sites", "summed", "taking_part"]


@dataclass(frozen=True, slots=True)
class Site:
    """One module and the updates that adapters make to it, in fp32. An adapter that leaves it alone is not there.

    Attributes:
        path: The module.
        deltas: At least one, all of one shape.
        weights: One each, none of them 0.
        bodies: The adapters, for methods that look at more than the updates.
    """

    path: str
    deltas: tuple[Delta, ...]
    weights: tuple[float, ...]
    bodies: tuple[Body, ...]

    def those(self, wanted: Callable[[Delta], bool]) -> Site | None:
        """With some of the updates; None if there are none."""
        kept = [number for number, delta in enumerate(self.deltas) if wanted(delta)]
        if not kept:
            return None
        return Site(
            self.path,
            tuple(self.deltas[number] for number in kept),
            tuple(self.weights[number] for number in kept),
            tuple(self.bodies[number] for number in kept),
        )


Vectors = Callable[[Site], Tensor]
"""Merges the Δb of a module, [d]; every update there has one."""


def summed(scaling: float = 1.0) -> Vectors:
    """λ Σ w_t Δb_t."""

    def merged(site: Site) -> Tensor:
        return scaling * _weighted(site)

    return merged


def averaged(scaling: float = 1.0) -> Vectors:
    """λ Σ w_t Δb_t / Σ |w_t|: for methods that are defined for matrices alone."""

    def merged(site: Site) -> Tensor:
        return scaling * _weighted(site) / sum(map(abs, site.weights))

    return merged


def as_rows(merged: Callable[[Site], Delta]) -> Vectors:
    """The method itself, on matrices of one row: for methods that look at single entries."""

    def vector(site: Site) -> Tensor:
        rows = tuple(_row(delta.bias) for delta in site.deltas if delta.bias is not None)
        return merged(replace(site, path=f"{site.path}.bias", deltas=rows)).dense()[0]

    return vector


def taking_part(bodies: Sequence[Body], weights: Sequence[float]) -> tuple[list[Body], list[float]]:
    """The adapters whose weight is not 0 at every module, and those weights.

    Raises:
        MergeError: If there are none.
    """
    left = [
        (body, weight)
        for body, weight in zip(bodies, weights, strict=True)
        if any(body.weight_at.get(path, weight) != 0 for path in body.config.targets)
    ]
    if not left:
        raise MergeError("all weights are 0: nothing is left to merge; give at least one weight other than 0")
    return [body for body, _ in left], [weight for _, weight in left]


def merge_sites(
    bodies: Sequence[Body],
    weights: Sequence[float],
    merged: Callable[[Site], Delta],
    *,
    vectors: Vectors,
    factored: bool = True,
) -> Body:
    """Merge module by module, so that what a method needs is there for one module at a time.

    Args:
        bodies: Adapters of linear methods, also of several; their ranks, scales and targets may differ.
        weights: One each. Adapters of weight 0 take no part.
        merged: Merges the ΔW of one module. It is not asked where nothing but biases changes.
        vectors: Merges the Δb.
        factored: Give `merged` factors alone, even of an update that scales the base's weight and is of full rank; else
            it sees those updates as they are.

    Returns:
        See `body_of_updates`, in fp32.

    Raises:
        MergeError: If all weights are 0, two adapters disagree on a module's shape, or a weight is not finite.
    """
    chosen, factors = taking_part(bodies, weights)
    for body in chosen:
        check_linear(body)
    targets = [
        {path: body.weight_at.get(path, weight) for path in body.config.targets}
        for body, weight in zip(chosen, factors, strict=True)
    ]
    found: dict[str, Delta] = {}
    for path in union_of_targets(chosen):
        here = [number for number, one in enumerate(targets) if one.get(path, 0) != 0]
        if not here:
            continue
        site = Site(
            path,
            tuple(delta_at(chosen[number], path) for number in here),
            tuple(targets[number][path] for number in here),
            tuple(chosen[number] for number in here),
        )
        _check(site)
        found[path] = _at(site, merged, vectors, factored).float()
    return body_of_updates(found, chosen)


def _at(site: Site, merged: Callable[[Site], Delta], vectors: Vectors, factored: bool) -> Delta:
    matrices, biases = site.those(lambda one: one.changes_weight), site.those(lambda one: one.bias is not None)
    # what keeps its rank tells nothing of biases: they are merged apart
    bare = [replace(one.factored() if factored else one, bias=None) for one in matrices.deltas] if matrices else []
    widest = max(site.deltas, key=lambda one: one.shape[1])
    found = widest.nothing() if matrices is None else merged(replace(matrices, deltas=tuple(bare)))
    return found if biases is None else replace(found, bias=vectors(biases))


def _weighted(site: Site) -> Tensor:
    parts = [
        w * delta.bias.double() for delta, w in zip(site.deltas, site.weights, strict=True) if delta.bias is not None
    ]
    return torch.stack(parts).sum(0)


def _row(vector: Tensor) -> Delta:
    return Delta(vector.new_ones(1, 1), vector[None])


def _check(site: Site) -> None:
    shapes = {delta.shape for delta in site.deltas}
    if len({d_out for d_out, _ in shapes}) > 1 or len({d_in for _, d_in in shapes if d_in}) > 1:
        raise MergeError(f"{site.path}: updates of different shapes {sorted(shapes)}; are they of one base model?")
    for delta, body in zip(site.deltas, site.bodies, strict=True):
        if not all(bool(torch.isfinite(tensor).all()) for tensor in delta.tensors()):
            raise MergeError(
                f"{site.path}: {body.name} has NaN or infinite weights, which cannot be merged; train the adapter again"
            )
