"""The ledger of merges: a record tells enough to merge again, bit for bit, and to merge without one of the parents.

Parents are looked up by their digests, so what is merged again is what was merged. The same bits are promised for the
same versions of torch and of the methods on the same kind of processor: merges run on one thread, draw from
recorded seeds, and read nothing but the parents (and examples, where a method looks at activations).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from graftory.adapter import Adapter, AdapterRef, AdapterSpec, Parent
from graftory.compose.merge import METHODS, merge
from graftory.compose.merge.base import MergeParameters
from graftory.compose.merge.loading import base_for
from graftory.compose.merge.mera import MeraParameters
from graftory.compose.merge.weighting import EVERYWHERE, Weights, fits
from graftory.compose.record import record_examples
from graftory.errors import MergeError
from graftory.hub import Hub
from graftory.schema import Json, decode
from graftory.settings import SelectSettings
from graftory.versions import library_versions

_OF_INPUTS = ("examples", "seed", "per_domain")
"""Notes that a merge by activations depends on."""
_TUNED = {"tuned", "auto"}
"""Notes of merges that all parents had a say in, beside what they were merged by."""


@dataclass(frozen=True, slots=True)
class Entry:
    """How an adapter was merged.

    Attributes:
        method: A row of `METHODS`.
        weights: One for each parent by patterns of modules, see `merge`; without that of everywhere, the method's own.
        parameters: Of the method.
        parents: What was merged, in order.
        notes: What else the lineage tells.
    """

    method: str
    weights: Mapping[str, tuple[float, ...]]
    parameters: MergeParameters
    parents: tuple[Parent, ...]
    notes: Mapping[str, Json]


def entry_of(spec: AdapterSpec, name: str) -> Entry:
    """Read how an adapter was merged from its lineage.

    Args:
        spec: Its specification.
        name: What error texts call it.

    Raises:
        MergeError: If it is no merge, or the record does not name method, weights and parents.
    """
    lineage = spec.lineage
    if lineage.process != "merge":
        raise MergeError(f"{name} is no merge: its record says {lineage.process!r}; give one that hub merge made")
    told = dict(lineage.parameters)
    method, weights = told.pop("method", None), told.pop("weights", None)
    row = METHODS.get(method) if isinstance(method, str) else None
    if row is None:
        raise MergeError(f"{name} was merged by {method!r}, which is unknown here; known: {', '.join(METHODS)}")
    if not isinstance(weights, list) or len(weights) != len(lineage.parents):
        raise MergeError(f"{name}: its record does not name the parents and their weights; merge them anew")
    factors = decode(tuple[float, ...], weights, f"{name}: weights")
    listed = told.pop("weights_at", [])
    if not isinstance(listed, list) or not all(isinstance(one, list) and one for one in listed):
        raise MergeError(f"{name}: its record does not tell the weights of single modules; merge anew")
    given = {str(one[0]): decode(tuple[float, ...], one[1:], f"{name}: weights_at") for one in listed}
    own = {field.name for field in fields(row.params)}
    parameters = decode(row.params, {key: told[key] for key in told if key in own}, name)
    if set(factors) != {row.default_weight(len(factors))}:
        given = {EVERYWHERE: factors, **given}
    notes = {key: value for key, value in told.items() if key not in own or key in _OF_INPUTS}
    return Entry(row.name, given, parameters, lineage.parents, notes)


def remake(hub: Hub, entry: Entry) -> Adapter:
    """Merge what an entry says.

    Raises:
        AdapterNotFoundError: If a parent is not in the hub.
        MergeError: If the parents cannot be merged.
    """
    return _merged(hub, entry, entry.weights)


def _name_of(parent: Parent) -> AdapterRef:
    return AdapterRef(AdapterRef.parse(parent.ref).name, digest=parent.digest)


def _merged(hub: Hub, entry: Entry, weights: Weights | None) -> Adapter:
    adapters = [hub.get(_name_of(parent)) for parent in entry.parents]
    return merge(
        adapters,
        entry.method,
        weights=entry.weights if weights is None else weights,
        parameters=entry.parameters,
        inputs=_inputs(entry, adapters),
        base=base_for(adapters, entry.method),
        parents=entry.parents,
        notes=entry.notes,
    )


def _inputs(entry: Entry, adapters: Sequence[Adapter]) -> Sequence[Mapping[str, Tensor]]:
    """What the method looked at, recorded again."""
    if entry.parameters.reads == "nothing":
        return ()
    examples = entry.notes.get("examples")
    if not isinstance(examples, str) and (examples is not None or entry.parameters.reads == "examples"):
        raise MergeError(f"{entry.method} looked at inputs that the record does not name; merge anew with --examples")
    limit = decode(int, entry.notes.get("per_domain", SelectSettings().per_domain), "per_domain")
    seed = decode(int, entry.notes.get("seed", 0), "seed")
    return record_examples(adapters, examples, limit=limit, seed=seed, gradients=entry.parameters.gradients)


@dataclass(frozen=True, slots=True)
class Remade:
    """A merge that was made again, held against the stored one.

    Attributes:
        adapter: The new one.
        different: Names of tensors whose bits are others, or that only one of them has.
        largest: The largest difference of a weight, None if tensors or shapes are others.
        libraries: Versions then and now, where they are others.
    """

    adapter: Adapter
    different: tuple[str, ...]
    largest: float | None
    libraries: Mapping[str, tuple[str | None, str | None]]

    @property
    def same(self) -> bool:
        """Whether every bit is the same."""
        return not self.different


def merge_again(hub: Hub, ref: str | AdapterRef) -> Remade:
    """Make a stored merge again from its parents, and compare every bit; nothing is written.

    Raises:
        AdapterNotFoundError: If it, or a parent, is not in the hub.
        MergeError: If it is no merge, or its record does not tell enough.
    """
    record = hub.record(ref)
    stored = hub.get(record.ref)
    made = remake(hub, entry_of(record.spec, str(record.ref)))
    names = sorted({*stored.tensors, *made.tensors})
    pairs = {name: (stored.tensors.get(name), made.tensors.get(name)) for name in names}
    different = {name: pair for name, pair in pairs.items() if not _same_bits(*pair)}
    then, today = record.spec.lineage.libraries, library_versions()
    libraries = {name: (then.get(name), today.get(name)) for name in sorted({*then, *today})}
    return Remade(
        made,
        tuple(different),
        _largest_difference(different.values()),
        {name: pair for name, pair in libraries.items() if pair[0] != pair[1]},
    )


def _same_bits(before: Tensor | None, now: Tensor | None) -> bool:
    return before is not None and now is not None and before.dtype == now.dtype and torch.equal(before, now)


def _largest_difference(pairs: Iterable[tuple[Tensor | None, Tensor | None]]) -> float | None:
    largest = 0.0
    for before, now in pairs:
        if before is None or now is None or before.shape != now.shape:
            return None
        largest = max(largest, float((before.double() - now.double()).abs().max()))
    return largest


def merge_without(
    hub: Hub, ref: str | AdapterRef, leave_out: Sequence[str], *, weights: Weights | None = None
) -> Adapter:
    """Make a stored merge again as if some of its parents had never been merged: the same as merging the others.

    Args:
        hub: Where it and its parents are.
        ref: The merge.
        leave_out: References to its parents.
        weights: Those of the ones that are left, as in `merge`; by default the recorded ones, or the method's own if
            those were.

    Raises:
        AdapterNotFoundError: If it, or a parent, is not in the hub.
        MergeError: If it is no merge, one left out is no parent of it, none are left, or weights or
            method were found with all of them.
    """
    record = hub.record(ref)
    entry = entry_of(record.spec, str(record.ref))
    gone = {_place(hub, entry, one, str(record.ref)) for one in leave_out}
    if weights is None and _TUNED & set(entry.notes):
        raise MergeError(
            f"{record.ref}: its {'method was' if 'auto' in entry.notes else 'weights were'} found with all parents in "
            "it; merge the others anew, or give --weights"
        )
    left = [number for number in range(len(entry.parents)) if number not in gone]
    if not left:
        raise MergeError(f"{record.ref}: no parent is left without {', '.join(leave_out)}; leave one in")
    parents = tuple(entry.parents[number] for number in left)
    return _merged(
        hub,
        Entry(
            entry.method,
            _weights_left(hub, entry, left),
            _renumbered(entry.parameters, left),
            parents,
            {
                key: note
                for key, note in entry.notes.items()
                if key in _OF_INPUTS and entry.parameters.reads != "nothing"
            },
        ),
        weights,
    )


def _weights_left(hub: Hub, entry: Entry, left: Sequence[int]) -> dict[str, tuple[float, ...]]:
    """The weights of some parents, without patterns that fit no module of theirs."""
    specs = [hub.record(_name_of(entry.parents[number])).spec for number in left]
    paths = {path for spec in specs for path in spec.config.targets}
    return {
        pattern: tuple(values[number] for number in left)
        for pattern, values in entry.weights.items()
        if pattern == EVERYWHERE or any(fits(pattern, path) for path in paths)
    }


def _place(hub: Hub, entry: Entry, ref: str, name: str) -> int:
    digest = hub.record(ref).digest
    for number, parent in enumerate(entry.parents):
        if parent.digest == digest:
            return number
    raise MergeError(
        f"{ref} is no parent of {name}; its parents are {', '.join(parent.ref for parent in entry.parents)}"
    )


def _renumbered(parameters: MergeParameters, left: Sequence[int]) -> MergeParameters:
    """Parameters that count adapters, for those that are left."""
    if not isinstance(parameters, MeraParameters):
        return parameters
    if parameters.anchor - 1 not in left:
        raise MergeError("mera: the anchor, which the others are aligned to, cannot be left out; merge the others anew")
    return replace(parameters, anchor=left.index(parameters.anchor - 1) + 1)
