"""Sites that keep their adapters in banks, so that a batch over many of them is one call without copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from graftory.adapter import Adapter
from graftory.adapters.bank import Bank, picked
from graftory.adapters.route import Route, Selection
from graftory.adapters.site import Site, key_of
from graftory.config import AdapterConfig
from graftory.kernels import Routing
from graftory.kernels.gather import gather_vectors
from graftory.kernels.shapes import stack_padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

C = TypeVar("C", bound=AdapterConfig)


class Used(NamedTuple):
    """What a batched operation takes.

    Attributes:
        tensors: The banked parts of K adapters, [K, ...] each.
        scale: Of each, [K].
        routing: The adapters of each row, [E, M].
        sizes: True size of each, [K].
    """

    tensors: tuple[Tensor, ...]
    scale: Tensor
    routing: Routing
    sizes: Tensor


class BankedSite(Site[C]):
    """A site whose adapters lie in banks: one for each dtype and each kind of them that needs a call of its own."""

    padded: ClassVar[dict[str, int]]
    """The parts, and the dimension in which each is padded; the first part begins with the size of its adapter."""

    def __init__(self, model: PreTrainedModel, path: str, owner: int) -> None:
        super().__init__(model, path, owner)
        self.banks: list[Bank] = []
        self.capacity = 0

    def scale_of(self, config: C, path: str) -> float:
        """What an adapter's update is multiplied with."""
        del config, path
        return 1.0

    def kind_of(self, config: C) -> str:
        """What adapters of one call have in common."""
        del config
        return ""

    def rate_of(self, config: C) -> float:
        """How much of its input an adapter drops out while training."""
        del config
        return 0.0

    def reserve(self, places: int) -> None:
        """See `Site.reserve`."""
        self.capacity = places
        for bank in self.banks:
            bank.reserve(places)

    def put(self, slot: str, config: C, path: str, adapter: Adapter) -> None:
        """See `Site.put`."""
        tensors = {part: self.fitting(adapter, path, part, shape) for part, shape in self.shapes(config, path).items()}
        bank = self._bank(self.kind_of(config), tuple(tensor.dtype for tensor in tensors.values()))
        views = bank.put(slot, tensors, self.scale_of(config, path))
        self.weights[slot] = nn.ParameterDict({key_of(part): view for part, view in views.items()})
        self.configs[slot] = config

    def drop(self, slot: str) -> None:
        """See `Site.drop`."""
        super().drop(slot)
        for bank in self.banks:
            if slot in bank.layout:
                bank.drop(slot)
        if not self.capacity:
            self.banks = [bank for bank in self.banks if any(bank.layout)]

    def selections(self, route: Route, x: Tensor) -> list[tuple[Bank, Selection]]:
        """The rows of each bank."""
        found = [(bank, route.select(bank.layout, x)) for bank in self.banks]
        return [(bank, selection) for bank, selection in found if selection is not None]

    def taken(self, inputs: Tensor, selection: Selection) -> Tensor:
        """The inputs of a selection's rows, as their adapters read them: with dropout while training."""
        x = selection.take(inputs)
        self.show(x)
        if not self.training:
            return x
        rates = [self.rate_of(self.configs[slot]) for slot in selection.slots]
        kept = dropout_of(rates, selection.index, x.shape)
        return x if kept is None else x * kept.to(x.dtype)

    def used(self, bank: Bank, selection: Selection) -> Used:
        """What an operation over a selection takes: the whole bank, or, where gradients are needed or one adapter is
        all there is, the adapters that are used.
        """
        used = self._used(bank, selection)
        first, *others = used.tensors
        if all(tensor.dtype == first.dtype for tensor in others):
            return used
        dtype = reduce(torch.promote_types, {tensor.dtype for tensor in used.tensors})
        return used._replace(tensors=tuple(tensor.to(dtype) for tensor in used.tensors))

    def _used(self, bank: Bank, selection: Selection) -> Used:
        slots = selection.slots
        if self.made and any(slot in self.made for slot in slots):
            tensors = tuple(
                stack_padded([self.get(slot, part) for slot in slots], dim) for part, dim in self.padded.items()
            )
        elif bank.learns(slots):
            tensors = tuple(bank.joined(part, slots) for part in self.padded)
        elif len(slots) == 1:
            tensors = tuple(picked(bank.whole(part), [bank.place_of(slots[0])]) for part in self.padded)
        else:
            whole = tuple(map(bank.whole, self.padded))
            return Used(whole, bank.scales(), selection.own_routing, bank.sizes())
        places = [bank.place_of(slot) for slot in slots]
        return Used(tensors, picked(bank.scales(), places), selection.routing, picked(bank.sizes(), places))

    def _bank(self, kind: str, dtypes: tuple[torch.dtype, ...]) -> Bank:
        for bank in self.banks:
            if (bank.kind, bank.dtypes) == (kind, dtypes):
                return bank
        self.banks.append(Bank(tuple(self.padded), kind))
        self.banks[-1].reserve(self.capacity)
        return self.banks[-1]

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> BankedSite[C]:
        """Follow the parameters to another device or dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for bank in self.banks:
            bank.repair()
        return self


def summed(vectors: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """Σ_m w_m v_k of each row, k its adapters, [E, d], for vectors [K, d], index and weights [E, M]."""
    each = gather_vectors(vectors, index)
    return (each if weights is None else each * weights[..., None]).sum(1)


def dropout_of(rates: Sequence[float], index: Tensor, shape: Sequence[int]) -> Tensor | None:
    """What dropout multiplies numbers with: 0, or 1 / (1 - rate), by the rate of each row's adapters.

    Args:
        rates: The rate of each adapter.
        index: The adapters of each row, [E, M].
        shape: Of the numbers, [E, ..., M R]: those of a row's adapters side by side.

    Returns:
        The multipliers, [E, ..., M R] in fp32; None if no rate is above 0.
    """
    if not any(rates):
        return None
    keep = (1 - torch.tensor(rates, device=index.device))[index].repeat_interleave(shape[-1] // index.shape[1], 1)
    keep = keep.view(len(index), *[1] * (len(shape) - 2), -1).expand(*shape)
    # where nothing is kept 0 / 0 would be NaN
    return torch.bernoulli(keep) / keep.clamp(min=1e-6)
