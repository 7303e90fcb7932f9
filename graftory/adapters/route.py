"""Which adapter each row of a batch uses: an argument carried by a context, never a hook left behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graftory.errors import RouteError
from graftory.kernels import Routing

Weight = float | Tensor
"""A number, or a tensor with one number, through which gradients go."""
Row = str | Mapping[str, Weight] | None
"""What one row uses: an adapter's name, None (the bare base), or a weighted mixture of adapters."""


@dataclass(frozen=True, slots=True)
class Attached:
    """How routes see an attached adapter: the slot its weights are in, and whether it has a head."""

    slot: str
    has_head: bool


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows of a batch that a site must change.

    Attributes:
        slots: The adapters that they use, in the order of the site.
        rows: Their numbers, ascending, [E]; None if that is every row.
        index: The number in `slots` of each row's adapters, [E, M]; -1 behind the last of them.
        places: The same as numbers of the site's own places.
        full: Whether it is known that all rows have as many adapters, so that no index is -1.
        alike: Whether it is known that all rows have the same adapters, if not by the same weights.
        routing: `index` for the kernels, which keep there what they find out about it.
        own_routing: The same of `places`.
        weights: The weight of each, [E, M]; None if all are 1.
    """

    slots: tuple[str, ...]
    rows: Tensor | None
    index: Tensor
    places: Tensor
    weights: Tensor | None
    full: bool = False
    alike: bool = False
    routing: Routing = field(init=False)
    own_routing: Routing = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "routing", Routing(self.index, full=self.full, alike=self.alike))
        object.__setattr__(self, "own_routing", Routing(self.places, full=self.full, alike=self.alike))

    def take(self, x: Tensor) -> Tensor:
        """The inputs of the rows, [E, ...]."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def add(self, output: Tensor, update: Tensor, *, fresh: bool = False) -> Tensor:
        """`output` plus what is added to the rows; others keep their bits.

        Args:
            output: All rows.
            update: What is added to the rows of this selection.
            fresh: Whether `update` is nobody else's. Its memory is used then, where autograd does not mind: new
                memory costs as much as the sum.
        """
        update = update.to(output.dtype)
        if self.rows is not None:
            return output.index_add(0, self.rows, update)
        return update.add_(output) if fresh and not torch.is_grad_enabled() else output + update

    def put(self, output: Tensor, instead: Tensor) -> Tensor:
        """`output` with the rows replaced; others keep their bits."""
        instead = instead.to(output.dtype)
        return instead if self.rows is None else output.index_copy(0, self.rows, instead)

    def weighted(self, update: Tensor) -> Tensor:
        """An update times the weights, where a row has one adapter."""
        if self.weights is None:
            return update
        return update * self.weights[:, 0].to(update.dtype).view(-1, *[1] * (update.dim() - 1))

    def apart(self) -> Iterator[Selection]:
        """Selections with one adapter a row that together are this one."""
        if self.index.shape[1] == 1:
            yield self
            return
        for at in range(self.index.shape[1]):
            picked = (self.index[:, at] >= 0).nonzero()[:, 0]
            yield Selection(
                slots=self.slots,
                rows=picked if self.rows is None else self.rows[picked],
                index=self.index[picked, at : at + 1],
                places=self.places[picked, at : at + 1],
                weights=None if self.weights is None else self.weights[picked, at : at + 1],
                full=True,
            )

    def each(self) -> Iterator[tuple[str, Selection]]:
        """Every slot with the rows that use it, one adapter a row: for sites whose adapters run one after the other."""
        for part in self.apart():
            if len(part.slots) == 1:
                yield part.slots[0], part
                continue
            for number, slot in enumerate(part.slots):
                picked = (part.index[:, 0] == number).nonzero()[:, 0]
                if len(picked):
                    yield (
                        slot,
                        Selection(
                            slots=(slot,),
                            rows=picked if part.rows is None else part.rows[picked],
                            index=torch.zeros_like(part.index[picked]),
                            places=part.places[picked],
                            weights=None if part.weights is None else part.weights[picked],
                            full=True,
                        ),
                    )


class Route:
    """The choices of one batch: for each row its adapters with weights, and the adapter whose head it uses."""

    def __init__(self, rows: tuple[Mapping[str, Weight], ...], heads: tuple[str | None, ...], uniform: bool) -> None:
        self.rows = rows
        self.heads = heads
        self.uniform = uniform
        """One choice for all rows, whatever the batch's size."""
        self.taps: dict[str, Any] = {}
        """What sites have picked up on the way through the model, for others to find."""
        self._selections: dict[tuple[object, ...], Selection | None] = {}

    def select(self, layout: tuple[str | None, ...], x: Tensor) -> Selection | None:
        """The rows that concern a site, or None if there are none. Made once for all sites of one layout.

        Args:
            layout: The slots that the site holds, by place.
            x: A tensor with the rows of the batch.

        Raises:
            RouteError: If the batch's size is no multiple of the number of rows routed.
        """
        # weights that are tensors have a graph, or none
        key = (layout, x.shape[0], x.device, torch.is_grad_enabled())
        if key not in self._selections:
            self._selections[key] = self._selection(layout, x.shape[0], x.device)
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

    def _selection(self, layout: tuple[str | None, ...], batch: int, device: torch.device) -> Selection | None:
        place_of = {slot: place for place, slot in enumerate(layout) if slot is not None}
        chosen = [
            [(place_of[slot], weight) for slot, weight in mixture.items() if slot in place_of] for mixture in self.rows
        ]
        expanded = self._expanded(batch)
        rows = [number for number, row in enumerate(expanded) if chosen[row]]
        if not rows:
            return None
        used = sorted({place for mixture in chosen for place, _ in mixture})
        most = max(map(len, chosen))
        weights: list[list[Weight]] = [[weight for _, weight in chosen[expanded[row]]] for row in rows]
        places = [_filled([place for place, _ in chosen[expanded[row]]], most, -1) for row in rows]
        number_of = {place: number for number, place in enumerate(used)} | {-1: -1}
        return Selection(
            slots=tuple(slot for slot in map(layout.__getitem__, used) if slot is not None),
            rows=None if len(rows) == batch else torch.tensor(rows, device=device),
            index=torch.tensor([[number_of[place] for place in row] for row in places], device=device),
            places=torch.tensor(places, device=device),
            weights=_weights(weights, most, device),
            full=all(len(mixture) in (0, most) for mixture in chosen),
            alike=all(row == places[0] for row in places),
        )


def _filled(values: list[Any], size: int, filler: Any) -> list[Any]:
    return values + [filler] * (size - len(values))


def _weights(rows: list[list[Weight]], size: int, device: torch.device) -> Tensor | None:
    """[rows, size], with the gradients of those that are tensors; None if all are 1."""
    if not any(isinstance(weight, Tensor) for row in rows for weight in row):
        if all(weight == 1.0 for row in rows for weight in row):
            return None
        return torch.tensor([_filled(row, size, 0.0) for row in rows], device=device)
    scalars = [
        weight.to(device).reshape(()) if isinstance(weight, Tensor) else torch.tensor(float(weight), device=device)
        for row in rows
        for weight in _filled(row, size, 0.0)
    ]
    return torch.stack(scalars).view(len(rows), size)


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


def _mixture(row: Row, known: Mapping[str, Attached]) -> Mapping[str, Weight]:
    mixture: dict[str, Weight] = {} if row is None else {row: 1.0} if isinstance(row, str) else dict(row)
    for name, weight in mixture.items():
        if name not in known:
            raise RouteError(f"no adapter {name!r} is attached; attached: {', '.join(known) or 'none'}")
        if isinstance(weight, Tensor):
            # its value is not looked at: a device would be waited for
            if weight.numel() != 1 or not weight.is_floating_point():
                raise RouteError(f"weight of {name!r}: got {tuple(weight.shape)} of {weight.dtype}, wanted one number")
        elif not isinstance(weight, int | float) or weight != weight or abs(weight) == float("inf"):
            raise RouteError(f"weight of {name!r}: got {weight!r}, wanted a finite number")
    return mixture


def _head(mixture: Mapping[str, Weight], asked: str | None, known: Mapping[str, Attached]) -> str | None:
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
