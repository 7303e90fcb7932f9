"""One call of a PeftModel with `adapter_names`: which rows use which adapter, as its layers read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor, nn

from graftory.adapters.route import Route, Selection
from graftory.errors import RouteError

BASE = "__base__"
"""PEFT's name for rows without an adapter."""
_CHECKPOINT = "_gradient_checkpointing_func"
"""Where transformers keeps the function that runs a layer now, and again in the backward."""


class Owner:
    """Ties the layers of one model to its calls. It is copied with the model, so that a copy's calls are its own."""


class MixedCall:
    """The adapters of one batch.

    Args:
        names: An adapter for each row, or `__base__`.
        repeats: How often `generate` may repeat each row in place, for beams and returned sequences.
        offsets: PEFT's `alora_offsets`, one for each row, if there are any.
    """

    def __init__(self, names: Sequence[str], repeats: int = 1, offsets: Sequence[int | None] | None = None) -> None:
        self.names = tuple(names)
        self.offsets = offsets
        self._repeats = (1,) if offsets is not None else (1, repeats)
        rows = tuple({} if name == BASE else {name: 1.0} for name in self.names)
        self._route = Route(rows, heads=(None,) * len(rows), uniform=False)

    def names_for(self, x: Tensor) -> list[str]:
        """The name of every row of a layer's input.

        Raises:
            RouteError: If the rows are not those that were named, or these repeated by `generate`.
        """
        repeat, rest = divmod(x.shape[0], len(self.names))
        if rest or repeat not in self._repeats:
            raise RouteError(f"adapter_names has {len(self.names)} names, the batch {x.shape[0]} rows; give one a row")
        return [name for name in self.names for _ in range(repeat)]

    def select(self, held: Sequence[str], x: Tensor) -> Selection | None:
        """The rows of `x` that use one of the adapters `held`, or None if there are none. Raises as `names_for`."""
        self.names_for(x)
        return self._route.select(tuple(held), x)


_CALLS: ContextVar[Mapping[Owner, MixedCall | None]] = ContextVar("graftory_peft_calls")


def call_of(owner: Owner) -> MixedCall | None:
    """The call in force for one model, in this thread and context."""
    return _CALLS.get({}).get(owner)


@contextmanager
def in_call(owner: Owner, call: MixedCall | None) -> Iterator[None]:
    """Put a call in force for one model; what was there before comes back on exit, come what may."""
    token = _CALLS.set({**_CALLS.get({}), owner: call})
    try:
        yield
    finally:
        _CALLS.reset(token)


@contextmanager
def recomputed_in_call(model: nn.Module, owner: Owner, call: MixedCall) -> Iterator[None]:
    """Keep a call for gradient checkpointing, which runs layers again in the backward, when the call is over."""
    layers = [module for module in model.modules() if _CHECKPOINT in vars(module)]
    before = [vars(layer)[_CHECKPOINT] for layer in layers]
    try:
        for layer, checkpoint in zip(layers, before, strict=True):
            setattr(layer, _CHECKPOINT, partial(_checkpoint, checkpoint, owner, call))
        yield
    finally:
        for layer, checkpoint in zip(layers, before, strict=True):
            setattr(layer, _CHECKPOINT, checkpoint)


def _checkpoint(
    checkpoint: Callable[..., Any],
    owner: Owner,
    call: MixedCall,
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    def run(*inputs: Any, **named: Any) -> Any:
        with in_call(owner, call):
            return function(*inputs, **named)

    return checkpoint(run, *args, **kwargs)
