"""Banks: the weights of many adapters at one site, each part in one tensor, with a view of it for each adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


@dataclass(eq=False)
class Bank:
    """Places for adapters; those of one bank have the same dtypes and device.

    A parameter of an adapter is a view of its place, so the steps of an optimizer are in the bank at once, a batch
    over all adapters needs no copy, and one adapter comes or goes without touching the others. Where the places run
    out, or an adapter is wider than all before it, the bank moves to a larger tensor, at least twice as large.

    Attributes:
        parts: What an adapter has here, behind the path; the first one's first dimension is its size (rank, width).
        kind: What its adapters have in common, for the site to know.
        layout: The adapter in each place, or None.
    """

    parts: tuple[str, ...]
    kind: str = ""
    layout: tuple[str | None, ...] = ()
    _whole: dict[str, Tensor] = field(default_factory=dict)
    _views: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)
    _scales: Tensor = field(default_factory=lambda: torch.zeros(0))
    _sizes: Tensor = field(default_factory=lambda: torch.zeros(0))
    _reserved: int = 0

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the parts; none while there is nothing."""
        return tuple(whole.dtype for whole in self._whole.values())

    def reserve(self, places: int) -> None:
        """Make room for so many adapters when the bank next moves."""
        self._reserved = places

    def put(self, slot: str, tensors: Mapping[str, Tensor], scale: float) -> dict[str, nn.Parameter]:
        """Copy an adapter's tensors to a free place.

        Args:
            slot: The adapter.
            tensors: Its parts by name.
            scale: What its update is multiplied with.

        Returns:
            Its parameters.
        """
        if None not in self.layout or not self._fits(tensors):
            self._move(tensors)
        place = self.layout.index(None)
        views = {}
        for name in self.parts:
            # `.data` has a version counter of its own: what autograd has saved of other places is still good
            row = self._whole[name].data[place].zero_()
            _cut(row, tensors[name].shape).copy_(tensors[name])
            views[name] = nn.Parameter(_cut(self._whole[name][place], tensors[name].shape))
        self._scales[place] = scale
        self._sizes[place] = len(tensors[self.parts[0]])
        self._views[slot] = views
        self.layout = (*self.layout[:place], slot, *self.layout[place + 1 :])
        return views

    def drop(self, slot: str) -> None:
        """Free an adapter's place."""
        del self._views[slot]
        self.layout = tuple(None if each == slot else each for each in self.layout)

    def whole(self, part: str) -> Tensor:
        """A part of all places, [places, ...], without gradients."""
        return self._whole[part].data

    def scales(self) -> Tensor:
        """The scale of every place, [places], fp32."""
        return self._scales

    def sizes(self) -> Tensor:
        """The size of every place, [places], fp32; 0 for one that never held an adapter."""
        return self._sizes

    def place_of(self, slot: str) -> int:
        """The place of an adapter."""
        return self.layout.index(slot)

    def learns(self, slots: Sequence[str]) -> bool:
        """Whether the backward needs gradients of one of these adapters."""
        return torch.is_grad_enabled() and any(
            view.requires_grad for slot in slots for view in self._views[slot].values()
        )

    def joined(self, part: str, slots: Sequence[str]) -> Tensor:
        """A part of some adapters, [slots, ...], with gradients to each of their parameters; a copy only where the
        places do not follow each other.
        """
        places = [self.place_of(slot) for slot in slots]
        views = [self._views[slot][part] for slot in slots]
        joined: Tensor = _Joined.apply(self._whole[part], places, *views)  # type: ignore[no-untyped-call]
        return joined

    def repair(self) -> None:
        """See that the parameters are views again, after a module has moved or replaced their data."""
        if self._is_whole():
            return
        values = {slot: {name: view.data for name, view in views.items()} for slot, views in self._views.items()}
        self._rebuild(values, len(self.layout))

    def _is_whole(self) -> bool:
        return all(
            view.data_ptr() == self._whole[name][place].data_ptr() and view.dtype == self._whole[name].dtype
            for place, slot in enumerate(self.layout)
            if slot is not None
            for name, view in self._views[slot].items()
        )

    def _fits(self, tensors: Mapping[str, Tensor]) -> bool:
        return all(
            all(new <= old for new, old in zip(tensors[name].shape, self._whole[name].shape[1:], strict=True))
            for name in self.parts
        )

    def _move(self, tensors: Mapping[str, Tensor]) -> None:
        """Go to larger tensors, with room for one more adapter that has these."""
        used = len(self._views)
        places = len(self.layout) if used < len(self.layout) else max(self._reserved, 2 * used, 1)
        values = {slot: {name: view.data for name, view in views.items()} for slot, views in self._views.items()}
        self._rebuild(values, places, tensors)

    def _rebuild(
        self, values: Mapping[str, Mapping[str, Tensor]], places: int, more: Mapping[str, Tensor] | None = None
    ) -> None:
        """Make the tensors anew around some adapters, which keep their places."""
        everyone = [*values.values(), *([more] if more else [])]
        for name in self.parts:
            shapes = [tensors[name].shape for tensors in everyone]
            whole = everyone[-1][name].new_zeros((places, *(max(sizes) for sizes in zip(*shapes, strict=True))))
            for slot, tensors in values.items():
                row = _cut(whole[self.place_of(slot)], tensors[name].shape)
                row.copy_(tensors[name])
                self._views[slot][name].data = row
            self._whole[name] = whole
        device, more_places = everyone[-1][self.parts[0]].device, places - len(self.layout)
        self._scales = functional.pad(self._scales.to(device), (0, more_places))
        self._sizes = functional.pad(self._sizes.to(device), (0, more_places))
        self.layout += (None,) * more_places


class _Joined(torch.autograd.Function):
    """Some places of a bank as one tensor, whose gradients go to the parameters."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, places: list[int], *views: Tensor) -> Tensor:
        """[places, ...]."""
        # saved for their versions: autograd refuses to go on where one has changed since
        ctx.save_for_backward(*views)
        return picked(whole.detach(), places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Each parameter's own part."""
        needed, views = ctx.needs_input_grad[2:], ctx.saved_tensors
        cut = [_cut(g, view.shape) if need else None for g, view, need in zip(grad, views, needed, strict=True)]
        return None, None, *cut


def picked(whole: Tensor, places: list[int]) -> Tensor:
    """Some places of what all have; a copy, and a list to bring to a GPU, only where they do not follow each other."""
    first = places[0]
    if places == list(range(first, first + len(places))):
        return whole.narrow(0, first, len(places))
    return whole.index_select(0, torch.tensor(places, device=whole.device))


def _cut(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The first part of a tensor in every dimension, as a view."""
    for dim, size in enumerate(shape):
        if tensor.shape[dim] != size:
            tensor = tensor.narrow(dim, 0, size)
    return tensor
