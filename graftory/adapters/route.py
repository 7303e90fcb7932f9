"""Which adapter each row of a batch uses: an argument carried by a context, never a hook left behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from graftory.errors import RouteError

Row = str | Mapping[str, float] | None
"""What one row uses: an adapter's name, None (the bare base), or a weighted mixture of adapters."""


@dataclass(frozen=True, slots=True)
class Attached:
    """How routes see an attached adapter: the slot its weights are in, and whether it has a head."""

    slot: str
    has_head: bool


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows that a site must change, as (row, adapter, weight) entries.

    A row with a mixture has several entries. `rows` is None if entry i is simply row i.
    """

    slots: tuple[str, ...]
    rows: Tensor | None
    index: Tensor
    weights: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """The inputs of all entries, [entries, ...]."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def add(self, output: Tensor, update: Tensor) -> Tensor:
        """`output` plus the entries' weighted updates; rows without an entry keep their bits."""
        if self.weights is not None:
            update = update * self.weights.to(update.dtype).view(-1, *[1] * (update.dim() - 1))
        update = update.to(output.dtype)
        return output + update if self.rows is None else output.index_add(0, self.rows, update)


class Route:
    """The choices of one batch: for each row its adapters with weights, and the adapter whose head it uses."""

    def __init__(self, rows: tuple[Mapping[str, float], ...], heads: tuple[str | None, ...], uniform: bool) -> None:
        self.rows = rows
        self.heads = heads
        self.uniform = uniform
        """One choice for all rows, whatever the batch's size."""
        self.taps: dict[str, Tensor] = {}
        """Inputs that parallel adapters have picked up on their way through the model."""
        self._selections: dict[tuple[object, ...], Selection | None] = {}

    def select(self, slots: Sequence[str], x: Tensor) -> Selection | None:
        """The entries that concern a site holding the adapters in `slots`, or None if there are none.

        Raises:
            RouteError: If the batch's size is no multiple of the number of rows routed.
        """
        key = (tuple(slots), x.shape[0], x.device)
        if key not in self._selections:
            self._selections[key] = self._entries(slots, x)
        return self._selections[key]

    def head_rows(self, x: Tensor) -> list[str | None]:
        """The head that each row of `x` uses."""
        return [self.heads[row] for row in self._expanded(x.shape[0])]

    def _expanded(self, batch: int) -> list[int]:
        """The routed row behind each row of the batch. Beams, returned sequences and flattened tokens
        repeat every row in place, so row i of the route serves `repeat` rows from i * repeat on.
        """
        if self.uniform:
            return [0] * batch
        if batch % len(self.rows):
            raise RouteError(f"the route has {len(self.rows)} rows, the batch {batch}; give one choice per row")
        repeat = batch // len(self.rows)
        return [row for row in range(len(self.rows)) for _ in range(repeat)]

    def _entries(self, slots: Sequence[str], x: Tensor) -> Selection | None:
        entries = [
            (row, slot, weight)
            for row, chosen in enumerate(self._expanded(x.shape[0]))
            for slot, weight in self.rows[chosen].items()
            if slot in slots
        ]
        if not entries:
            return None
        used = tuple(dict.fromkeys(slot for _, slot, _ in entries))
        rows = [row for row, _, _ in entries]
        weights = [weight for _, _, weight in entries]
        return Selection(
            slots=used,
            rows=None if rows == list(range(x.shape[0])) else torch.tensor(rows, device=x.device),
            index=torch.tensor([used.index(slot) for _, slot, _ in entries], device=x.device),
            weights=None if all(weight == 1.0 for weight in weights) else torch.tensor(weights, device=x.device),
        )


def make_route(
    rows: str | Sequence[Row] | None,
    heads: str | Sequence[str | None] | None,
    known: Mapping[str, Attached],
) -> Route:
    """Check and normalise what a user asked for.

    Args:
        rows: One choice for every row, or a choice per row.
        heads: The adapter whose head each row uses; None means the row's own adapter.
        known: The attached adapters by name.

    Raises:
        RouteError: If a name is not attached, a weight is not finite, or a row's head is ambiguous.
    """
    uniform = rows is None or isinstance(rows, str)
    listed: Sequence[Row] = [rows] if rows is None or isinstance(rows, str) else list(rows)
    if not listed:
        raise RouteError("the route has no rows; give one choice per row of the batch")
    if not uniform and isinstance(heads, str):
        heads = [heads] * len(listed)
    asked = [heads] if heads is None or isinstance(heads, str) else list(heads)
    if heads is None:
        asked = [None] * len(listed)
    if len(asked) != len(listed):
        raise RouteError(f"got {len(asked)} heads for {len(listed)} rows; give one per row, or one for all")
    mixtures = [_mixture(row, known) for row in listed]
    owners = [_head(mixture, head, known) for mixture, head in zip(mixtures, asked, strict=True)]
    return Route(
        rows=tuple({known[name].slot: weight for name, weight in mixture.items()} for mixture in mixtures),
        heads=tuple(None if owner is None else known[owner].slot for owner in owners),
        uniform=uniform,
    )


def _mixture(row: Row, known: Mapping[str, Attached]) -> Mapping[str, float]:
    mixture = {} if row is None else {row: 1.0} if isinstance(row, str) else dict(row)
    for name, weight in mixture.items():
        if name not in known:
            raise RouteError(f"no adapter {name!r} is attached; attached: {', '.join(known) or 'none'}")
        if not isinstance(weight, int | float) or weight != weight or abs(weight) == float("inf"):
            raise RouteError(f"weight of {name!r}: got {weight!r}, wanted a finite number")
    return mixture


def _head(mixture: Mapping[str, float], asked: str | None, known: Mapping[str, Attached]) -> str | None:
    owners = [name for name, attached in known.items() if attached.has_head]
    if asked is not None:
        if asked not in owners:
            raise RouteError(f"no adapter {asked!r} with a head is attached; with one: {', '.join(owners) or 'none'}")
        return asked
    own = [name for name in mixture if name in owners]
    if len(own) > 1:
        raise RouteError(f"a row mixes adapters with heads ({', '.join(own)}); say which head it uses with heads=[...]")
    return own[0] if own else None


_ROUTES: ContextVar[Mapping[int, Route]] = ContextVar("graftory_routes")


def current_route(owner: int) -> Route | None:
    """The route in force for one adapted model, in this thread and context."""
    return _ROUTES.get({}).get(owner)


class routed:  # noqa: N801 - used as a context manager, like `torch.no_grad`
    """Put a route in force for one adapted model; what was there before comes back on exit, come what may."""

    def __init__(self, owner: int, route: Route) -> None:
        self._owner = owner
        self._route = route

    def __enter__(self) -> None:
        self._token = _ROUTES.set({**_ROUTES.get({}), self._owner: self._route})

    def __exit__(self, *_: object) -> None:
        _ROUTES.reset(self._token)
        self._route.taps.clear()
