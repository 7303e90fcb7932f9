"""What differs between two versions: what is recorded of them, and how far their tensors are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from graftory.adapter import AdapterSpec, Metric, spec_to_json
from graftory.config import LoraConfig
from graftory.hub.depot import Depot
from graftory.hub.norms import Apart, Distance, Values, between, between_updates
from graftory.hub.records import Record, TensorEntry
from graftory.schema import Json


@dataclass(frozen=True, slots=True)
class FieldChange:
    """A recorded value that differs; one that a side does not have is None.

    Attributes:
        field: Where it stands in the specification: `config.rank`.
        left: Its value in the first version.
        right: Its value in the second.
    """

    field: str
    left: Json
    right: Json


@dataclass(frozen=True, slots=True)
class MetricChange:
    """One metric on one split of one data set; a side that was not measured is None."""

    name: str
    data: str
    split: str
    left: float | None
    right: float | None
    difference: float | None


@dataclass(frozen=True, slots=True)
class TensorChange:
    """A tensor whose bytes differ. Shapes that differ have no distance."""

    name: str
    left: TensorEntry
    right: TensorEntry
    change: Distance | None


@dataclass(frozen=True, slots=True)
class UpdateChange:
    """The LoRA updates s B A of one module: what the model sees, whatever factors it is written in.

    Attributes:
        module: Module path; empty for all modules together.
        left_rank: Rank in the first version, the largest one of all modules; 0 if it has no such module.
        right_rank: The same of the second.
        change: How far they are apart.
    """

    module: str
    left_rank: int
    right_rank: int
    change: Distance


@dataclass(frozen=True, slots=True)
class Difference:
    """Everything that differs between two versions, the largest changes of tensors first.

    Attributes:
        left: The first version.
        right: The second.
        same: Whether they are one adapter, by digest.
        fields: Recorded values that differ.
        metrics: Every metric that either has, with the difference.
        only_left: Tensors that only the first has.
        only_right: Tensors that only the second has.
        unchanged: How many tensors are equal byte for byte.
        tensors: Tensors that both have, with other bytes.
        updates: The updates of every module, if both are LoRA and any differs; first those of all
            modules together. Modules whose layers have other shapes are left out.
    """

    left: str
    right: str
    same: bool
    fields: tuple[FieldChange, ...]
    metrics: tuple[MetricChange, ...]
    only_left: tuple[str, ...]
    only_right: tuple[str, ...]
    unchanged: int
    tensors: tuple[TensorChange, ...]
    updates: tuple[UpdateChange, ...]


def diff(depot: Depot, left: Record, right: Record) -> Difference:
    """Compare two versions of a hub. Files are read only where the records say that tensors differ.

    Raises:
        CorruptAdapterError: If the bytes that have to be read are not the recorded ones.
    """
    before, after = ({tensor.name: tensor for tensor in record.tensors} for record in (left, right))
    shared = [name for name in before if name in after]
    changed = [name for name in shared if before[name] != after[name]]
    scaled = _scales(left.spec) != _scales(right.spec)
    values = _Pair(Values(depot, left), Values(depot, right)) if changed or set(before) ^ set(after) or scaled else None
    return Difference(
        left=str(left.ref),
        right=str(right.ref),
        same=left.digest == right.digest,
        fields=tuple(_fields(left.spec, right.spec)),
        metrics=tuple(_metrics(left.spec.metrics, right.spec.metrics)),
        only_left=tuple(name for name in before if name not in after),
        only_right=tuple(name for name in after if name not in before),
        unchanged=len(shared) - len(changed),
        tensors=tuple(_tensors(values, [(before[name], after[name]) for name in changed])) if values else (),
        updates=tuple(_updates(values, left.spec, right.spec)) if values else (),
    )


@dataclass(frozen=True, slots=True)
class _Pair:
    left: Values
    right: Values


def _fields(left: AdapterSpec, right: AdapterSpec) -> Iterator[FieldChange]:
    before, after = (dict(_flat(spec_to_json(spec))) for spec in (left, right))
    for field in {**before, **after}:
        if not field.startswith("metrics") and before.get(field) != after.get(field):
            yield FieldChange(field, before.get(field), after.get(field))


def _flat(value: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{path}.{key}" if path else key)


def _metrics(left: tuple[Metric, ...], right: tuple[Metric, ...]) -> Iterator[MetricChange]:
    before, after = ({(row.name, row.data, row.split): row.value for row in rows} for rows in (left, right))
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        yield MetricChange(*key, old, new, new - old if old is not None and new is not None else None)


def _tensors(values: _Pair, changed: list[tuple[TensorEntry, TensorEntry]]) -> list[TensorChange]:
    rows = []
    for left, right in changed:
        comparable = left.shape == right.shape
        change = between(values.left[left.name], values.right[right.name]) if comparable else None
        rows.append(TensorChange(left.name, left, right, change))
    return sorted(rows, key=lambda row: (-_size(row.change), row.name))


def _updates(values: _Pair, left: AdapterSpec, right: AdapterSpec) -> Iterator[UpdateChange]:
    if not (isinstance(left.config, LoraConfig) and isinstance(right.config, LoraConfig)):
        return
    before, after = _scales(left), _scales(right)
    parts, rows = [], []
    for path in sorted({**before, **after}):
        old = values.left.update(path, before[path]) if path in before else None
        new = values.right.update(path, after[path]) if path in after else None
        if old is None or new is None or old.outer == new.outer:
            parts.append(between_updates(old, new))
            rows.append(UpdateChange(path, old.rank if old else 0, new.rank if new else 0, parts[-1].measured()))
    if rows:
        ranks = max(row.left_rank for row in rows), max(row.right_rank for row in rows)
        yield UpdateChange("", *ranks, Apart.joined(parts).measured())
    yield from sorted(rows, key=lambda row: (-_size(row.change), row.module))


def _scales(spec: AdapterSpec) -> Mapping[str, float]:
    config = spec.config
    return {path: config.scale_of(path) for path in config.targets} if isinstance(config, LoraConfig) else {}


def _size(change: Distance | None) -> float:
    """What rows are ordered by; what cannot be measured comes first."""
    return change.relative if change is not None and change.relative is not None else float("inf")
