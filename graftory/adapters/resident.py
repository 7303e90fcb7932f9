"""More adapters than fit: those that batches ask for are loaded, those unused for longest make room."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from graftory.adapter import Adapter, AdapterRef, BaseModel
from graftory.adapters.adapted import AdaptedModel
from graftory.adapters.route import Row
from graftory.errors import ConfigError, RouteError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HELD: ContextVar[int] = ContextVar("graftory_resident_routes", default=0)


class Source(Protocol):
    """Where adapters come from; a `Hub` is one."""

    def resolve(self, ref: str, /) -> AdapterRef:
        """The version that a reference means now."""

    def get(self, ref: AdapterRef, /) -> Adapter:
        """The adapter of a version."""


class ResidentAdapters:
    """A model with up to `capacity` adapters of a hub in it, which change with the batches.

        resident = ResidentAdapters(model, Hub.open(), capacity=64)
        with resident.route(["trec@1", "sms:prod", None]):
            resident.model(**batch)

    The places are made once: an adapter that comes or goes is copied to its own place, or leaves it, and moves no
    other (unless it is wider than all before it). Threads may route at the same time: what one uses stays until its
    `with` ends, and who finds no place waits. Adapters that were trained here are not written back.

    Args:
        model: The base model.
        source: The hub.
        capacity: How many adapters are in the model at most.
        base: The description of `model`; taken from it if not given.

    Raises:
        ConfigError: If `capacity` is less than 1.
    """

    def __init__(
        self, model: PreTrainedModel, source: Source, *, capacity: int = 32, base: BaseModel | None = None
    ) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity: got {capacity}, wanted 1 or more")
        self.model = AdaptedModel(model, base, capacity=capacity)
        self.capacity = capacity
        self._source = source
        self._order: OrderedDict[str, None] = OrderedDict()
        self._pins: Counter[str] = Counter()
        self._changed = threading.Condition()

    @property
    def names(self) -> tuple[str, ...]:
        """The versions in the model, that used least recently first."""
        return tuple(self._order)

    @contextmanager
    def route(
        self, rows: str | Sequence[Row] | None, heads: str | Sequence[str | None] | None = None
    ) -> Iterator[None]:
        """Say which adapter each row of the batches inside the `with` uses; see `AdaptedModel.route`.

        Args:
            rows: References (`trec`, `trec@1`, `trec:prod`) in place of names.
            heads: References too.

        Raises:
            AdapterNotFoundError: If one names nothing in the hub.
            RouteError: If the rows use more adapters than there are places.
        """
        refs = _mentioned([rows] if isinstance(rows, str) or rows is None else rows)
        refs |= _mentioned([heads] if isinstance(heads, str) or heads is None else heads)
        versions = {ref: str(self._source.resolve(ref)) for ref in refs}
        wanted = tuple(dict.fromkeys(versions.values()))
        self._pin(wanted)
        held = _HELD.set(_HELD.get() + 1)
        try:
            with self.model.route(_translated(rows, versions), _translated(heads, versions)):
                yield
        finally:
            _HELD.reset(held)
            self._unpin(wanted)

    def detach(self) -> PreTrainedModel:
        """Take everything out and give back the base, bit for bit as it came."""
        with self._changed:
            self._order.clear()
            return self.model.detach()

    def _pin(self, wanted: tuple[str, ...]) -> None:
        if len(wanted) > self.capacity:
            raise RouteError(
                f"the rows use {len(wanted)} adapters, there are {self.capacity} places; use smaller batches or a "
                "larger capacity"
            )
        with self._changed:
            while len(set(wanted) | set(self._pins)) > self.capacity:
                if _HELD.get():
                    raise RouteError(
                        f"a route within another needs more than the {self.capacity} places there are; use a larger "
                        "capacity"
                    )
                self._changed.wait()
            self._pins.update(wanted)
            try:
                for name in wanted:
                    self._load(name)
            except BaseException:
                self._release(wanted)
                raise

    def _load(self, name: str) -> None:
        """Bring an adapter in if it is not, and note that it was used."""
        if name not in self._order:
            adapter = self._source.get(AdapterRef.parse(name))
            if len(self._order) >= self.capacity:
                oldest = next(each for each in self._order if each not in self._pins)
                del self._order[oldest]
                self.model.remove(oldest)
            self.model.add(name, adapter)
            self._order[name] = None
        self._order.move_to_end(name)

    def _unpin(self, wanted: tuple[str, ...]) -> None:
        with self._changed:
            self._release(wanted)

    def _release(self, wanted: tuple[str, ...]) -> None:
        self._pins.subtract(wanted)
        self._pins += Counter()  # forgets those at zero
        self._changed.notify_all()


def _mentioned(rows: Sequence[Row]) -> dict[str, None]:
    """The references in a route."""
    named = (() if row is None else (row,) if isinstance(row, str) else row for row in rows)
    return dict.fromkeys(ref for refs in named for ref in refs)


def _translated(rows: Any, versions: Mapping[str, str]) -> Any:
    """A route with versions for its references."""
    if rows is None or isinstance(rows, str):
        return rows and versions[rows]
    if isinstance(rows, Mapping):
        mixed: dict[str, Any] = {}
        for ref, weight in rows.items():
            # two references may mean one version
            mixed[versions[ref]] = mixed[versions[ref]] + weight if versions[ref] in mixed else weight
        return mixed
    return [_translated(row, versions) for row in rows]
