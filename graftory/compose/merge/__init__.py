"""Merging: many adapters to one adapter, a function of data. No model is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftory.adapter import Adapter, AdapterSpec, Lineage, Parent
from graftory.adapters.expansions import as_bottleneck
from graftory.compose.merge.adamerging import ADAMERGING
from graftory.compose.merge.base import Body, MergeMethod, MergeParameters, body_of
from graftory.compose.merge.core import CORE
from graftory.compose.merge.ctm import CTM
from graftory.compose.merge.dare import DARE, DARE_TIES
from graftory.compose.merge.della import DELLA
from graftory.compose.merge.fisher import FISHER
from graftory.compose.merge.heads import common_base, merge_heads
from graftory.compose.merge.iso import ISO_C, ISO_CTS
from graftory.compose.merge.kinds import KINDS, LINEAR_METHODS
from graftory.compose.merge.knots import KNOTS
from graftory.compose.merge.lego import LEGO
from graftory.compose.merge.linear import LINEAR
from graftory.compose.merge.lorahub import LORAHUB
from graftory.compose.merge.mera import MERA
from graftory.compose.merge.originals import Originals, no_originals, originals_of
from graftory.compose.merge.pico import PICO
from graftory.compose.merge.regmean import REGMEAN
from graftory.compose.merge.soup import SOUP
from graftory.compose.merge.svd import SVD
from graftory.compose.merge.ties import MAGNITUDE, TIES
from graftory.compose.merge.tsv import TSV
from graftory.compose.merge.weighting import Weighting, Weights, weighting_of
from graftory.errors import MergeError
from graftory.schema import Json, decode, encode
from graftory.versions import library_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TUNED = (LORAHUB, ADAMERGING)
_READING = (REGMEAN, FISHER)
_DELTA = (SVD, TIES, MAGNITUDE, DARE, DARE_TIES, DELLA, TSV, ISO_C, ISO_CTS, KNOTS, CORE, CTM, PICO, LEGO, *_READING)
METHODS: Mapping[str, MergeMethod] = {row.name: row for row in (LINEAR, SOUP, MERA, *_DELTA, *_TUNED)}
"""Every merge method, by name."""

__all__ = ["METHODS", "Body", "MergeMethod", "MergeParameters", "Weights", "merge", "needs_base"]


def merge(
    adapters: Sequence[Adapter],
    method: str = "linear",
    *,
    weights: Weights | None = None,
    rank: int | None = None,
    parameters: MergeParameters | None = None,
    inputs: Sequence[Mapping[str, Tensor]] = (),
    base: PreTrainedModel | None = None,
    parents: Sequence[Parent] = (),
    notes: Mapping[str, Json] | None = None,
) -> Adapter:
    """Make one adapter out of several.

    Heads of the same ordered labels are averaged, normalised by Σ w; otherwise the result has no head
    and no task, and each task keeps its own (`route(..., heads=...)`). The tensors are fp32.

    Args:
        adapters: At least one, all of one base model; of one method, or, for merges in delta space, of any that are
            linear in the weights (lora, dora, ia3, bitfit, ...).
        method: A row of `METHODS`.
        weights: One each; by default what the method's row says, such as 1/n. In delta space they may differ from
            module to module: a mapping from patterns of paths (`"layer.3.*"`; `"*"` is every other module, and heads)
            to one weight each, or to one number for all adapters. See `Weighting`.
        rank: Rank to cut the result to, for methods that can.
        parameters: Parameters of the method, of its own class (`METHODS[method].params`).
        inputs: What each adapter reads at its sites, for methods that look at it (`record_inputs`).
        base: The plain base model, for adapters that scale its own weights (`needs_base`).
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
    weighting = weighting_of(weights, len(adapters), row.default_weight(len(adapters)))
    factors = list(weighting.everywhere)
    if parents and len(parents) != len(adapters):
        raise MergeError(f"got {len(parents)} parents for {len(adapters)} adapters, wanted one each")
    adapters = [as_bottleneck(adapter) for adapter in adapters]
    _check_methods(row, adapters)
    common = common_base([adapter.spec.base for adapter in adapters])
    chosen = _parameters(row, rank, parameters)
    if inputs and len(inputs) != len(adapters):
        raise MergeError(f"got inputs of {len(inputs)} for {len(adapters)} adapters, wanted one each")
    originals: Originals = no_originals
    if base is not None and row.space == "delta" and needs_base(adapters):
        originals = originals_of(base, common)
    _check_weighting(row, weighting, adapters)
    bodies = [
        replace(
            body_of(adapter, number, inputs[number] if inputs else None, originals),
            weight_at=weighting.of(number, adapter.spec.config.targets),
        )
        for number, adapter in enumerate(adapters)
    ]
    with _one_thread():
        body = row.fn(bodies, factors, chosen)
    task, head = merge_heads(adapters, factors)
    recorded: dict[str, Json] = {"method": row.name, "weights": factors, **encode(chosen), **(notes or {})}
    if weighting.at:
        # a list, as objects are stored sorted, and the last pattern that fits counts
        recorded["weights_at"] = [[pattern, *values] for pattern, values in weighting.at.items()]
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
    spec = AdapterSpec(base=common, config=body.config, task=task, lineage=lineage, licence=licence)
    return Adapter(spec, {**body.tensors, **head})


def needs_base(adapters: Sequence[Adapter]) -> bool:
    """Whether the update of one of them depends on the base's weights, so that merging in delta space needs them."""
    configs = [adapter.spec.config for adapter in adapters]
    return any(type(config) in KINDS and KINDS[type(config)].needs_base(config) for config in configs)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The same bits on any number of cores, as sums over threads are rounded differently; merges are small work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_weighting(row: MergeMethod, weighting: Weighting, adapters: Sequence[Adapter]) -> None:
    if not weighting.at:
        return
    if row.space != "delta":
        raise MergeError(
            f"{row.name} takes one weight for each adapter; weights by module are for merges in delta space"
        )
    weighting.check(list(dict.fromkeys(path for adapter in adapters for path in adapter.spec.config.targets)))


def _check_methods(row: MergeMethod, adapters: Sequence[Adapter]) -> None:
    kinds = sorted({adapter.spec.method for adapter in adapters})
    if len(kinds) > 1 and not (row.space == "delta" and set(kinds) <= set(LINEAR_METHODS)):
        raise MergeError(
            f"adapters of different methods ({', '.join(kinds)}) cannot be merged by {row.name}; merge each kind alone "
            f"(those that change weights go together in delta space: {', '.join(LINEAR_METHODS)})"
        )
    for kind in kinds:
        if kind not in row.accepts:
            raise MergeError(f"{row.name} cannot merge {kind} adapters; it takes {', '.join(row.accepts)}")


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
