"""Merging: many adapters to one adapter, a function of data. No model is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from torch import Tensor

from graftory.adapter import Adapter, AdapterSpec, Lineage, Parent
from graftory.compose.merge.base import Body, MergeMethod, MergeParameters, body_of
from graftory.compose.merge.core import CORE
from graftory.compose.merge.ctm import CTM
from graftory.compose.merge.dare import DARE, DARE_TIES
from graftory.compose.merge.della import DELLA
from graftory.compose.merge.heads import common_base, merge_heads
from graftory.compose.merge.iso import ISO_C, ISO_CTS
from graftory.compose.merge.knots import KNOTS
from graftory.compose.merge.linear import LINEAR
from graftory.compose.merge.mera import MERA
from graftory.compose.merge.pico import PICO
from graftory.compose.merge.regmean import REGMEAN
from graftory.compose.merge.soup import SOUP
from graftory.compose.merge.svd import SVD
from graftory.compose.merge.ties import MAGNITUDE, TIES
from graftory.compose.merge.tsv import TSV
from graftory.errors import MergeError
from graftory.schema import Json, decode, encode
from graftory.versions import library_versions

_DELTA = (SVD, TIES, MAGNITUDE, DARE, DARE_TIES, DELLA, TSV, ISO_C, ISO_CTS, KNOTS, CORE, CTM, PICO, REGMEAN)
METHODS: Mapping[str, MergeMethod] = {row.name: row for row in (LINEAR, SOUP, MERA, *_DELTA)}
"""Every merge method, by name."""

__all__ = ["METHODS", "Body", "MergeMethod", "MergeParameters", "merge"]


def merge(
    adapters: Sequence[Adapter],
    method: str = "linear",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    parameters: MergeParameters | None = None,
    inputs: Sequence[Mapping[str, Tensor]] = (),
    parents: Sequence[Parent] = (),
    notes: Mapping[str, Json] | None = None,
) -> Adapter:
    """Make one adapter out of several.

    Heads of the same ordered labels are averaged, normalised by Σ w; otherwise the result has no head
    and no task, and each task keeps its own (`route(..., heads=...)`). The tensors are fp32.

    Args:
        adapters: At least one, all of one adapter method and one base model.
        method: A row of `METHODS`.
        weights: One each; by default 1/n.
        rank: Rank to cut the result to, for methods that can.
        parameters: Parameters of the method, of its own class (`METHODS[method].params`).
        inputs: What each adapter reads at its sites, for methods that look at it (`record_inputs`).
        parents: Where the adapters came from, one each in the same order (the hub knows the digests);
            relation and weight are filled in here.
        notes: What else the lineage should tell, such as how the adapters were selected.

    Raises:
        MergeError: If the method is unknown or cannot merge these adapters; the text says why.
        BaseMismatchError: If they belong to different base models.
    """
    row = METHODS.get(method)
    if row is None:
        raise MergeError(f"unknown merge method {method!r}; known: {', '.join(METHODS)}")
    if not adapters:
        raise MergeError("nothing to merge: give at least one adapter")
    factors = _checked_weights(row, len(adapters), weights)
    if parents and len(parents) != len(adapters):
        raise MergeError(f"got {len(parents)} parents for {len(adapters)} adapters, wanted one each")
    _check_methods(row, adapters)
    base = common_base([adapter.spec.base for adapter in adapters])
    chosen = _parameters(row, rank, parameters)
    if inputs and len(inputs) != len(adapters):
        raise MergeError(f"got inputs of {len(inputs)} for {len(adapters)} adapters, wanted one each")
    bodies = [body_of(adapter, i, inputs[i] if inputs else None) for i, adapter in enumerate(adapters)]
    with _one_thread():
        body = row.fn(bodies, factors, chosen)
    task, head = merge_heads(adapters, factors)
    recorded: dict[str, Json] = {"method": row.name, "weights": factors, **encode(chosen), **(notes or {})}
    lineage = Lineage(
        process="merge",
        parents=tuple(
            replace(parent, relation="merged", weight=weight) for parent, weight in zip(parents, factors, strict=False)
        ),
        parameters=recorded,
        libraries=library_versions(),
    )
    licences = {adapter.spec.licence for adapter in adapters}
    licence = licences.pop() if len(licences) == 1 else None
    spec = AdapterSpec(base=base, config=body.config, task=task, lineage=lineage, licence=licence)
    return Adapter(spec, {**body.tensors, **head})


@contextmanager
def _one_thread() -> Iterator[None]:
    """The same bits on any number of cores, as sums over threads are rounded differently; merges are small work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _checked_weights(row: MergeMethod, n: int, weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        return [row.default_weight(n)] * n
    if len(weights) != n:
        raise MergeError(f"got {len(weights)} weights for {n} adapters, wanted one each")
    if not all(math.isfinite(weight) for weight in weights):
        raise MergeError(f"weights: got {list(weights)}, wanted finite numbers")
    return [float(weight) for weight in weights]


def _check_methods(row: MergeMethod, adapters: Sequence[Adapter]) -> None:
    kinds = sorted({adapter.spec.method for adapter in adapters})
    if len(kinds) > 1:
        raise MergeError(f"adapters of different methods ({', '.join(kinds)}) cannot be merged; merge each kind alone")
    if kinds[0] not in row.accepts:
        raise MergeError(f"{row.name} cannot merge {kinds[0]} adapters; it takes {', '.join(row.accepts)}")


def _parameters(row: MergeMethod, rank: int | None, given: MergeParameters | None) -> MergeParameters:
    if given is not None:
        if type(given) is not row.params or rank is not None:
            raise MergeError(f"{row.name} takes parameters of {row.params.__name__}, and no rank beside them")
        return given
    if rank is None:
        return row.params()
    if "rank" not in {field.name for field in fields(row.params)}:
        can = ", ".join(m.name for m in METHODS.values() if "rank" in {field.name for field in fields(m.params)})
        raise MergeError(f"{row.name} takes no rank; methods that do: {can}")
    return decode(row.params, {"rank": rank}, row.name)
