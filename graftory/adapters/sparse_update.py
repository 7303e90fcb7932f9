"""Updates of single weights, and LoRA beside them: y = (W + S) x + s B A x, S 0 but at few positions.

S of an adapter is positions row · d_in + column, int32 [n] and rising, and values [n]. In a forward each adapter's rows
of the batch see its own S, which is written out for them as one [d_out, d_in] and dropped: in a batch over many
adapters there is one such matrix at a time, and never one for each row. The LoRA lies in the banks of plain LoRA.

Diff pruning and SPT are ways to train it; while they do, an adapter has what their recipes give it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftory.adapter import Adapter
from graftory.adapters.architectures import linear_widths, module_at
from graftory.adapters.lora import LORA, LoraSite
from graftory.adapters.method import Method
from graftory.adapters.site import Site, key_of
from graftory.adapters.targets import linear_targets
from graftory.config import (
    AdapterConfig,
    DiffConfig,
    LoraConfig,
    SparsePlace,
    SparseUpdateConfig,
    SptConfig,
)
from graftory.errors import ShapeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX, VALUE = SparseUpdateConfig.parts[:2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries(AdapterConfig):
    """S at one module."""

    method: ClassVar[str] = SparseUpdateConfig.method
    parts: ClassVar[tuple[str, ...]] = (INDEX, VALUE)
    whole_numbers: ClassVar[tuple[str, ...]] = (INDEX,)
    place: SparsePlace


class SparseSite(Site[Entries]):
    """Single entries of one linear layer's weight: positions [n] and values [n] of each adapter."""

    order: ClassVar[int] = -2

    def install(self, model: PreTrainedModel) -> None:
        """Add to what the linear layer returns, ahead of any bottleneck that reads it."""
        del model
        self.listen(self._hook)

    def shapes(self, config: Entries, path: str) -> Mapping[str, tuple[int, ...]]:
        """[n] each.

        Raises:
            ShapeError: If the layer is of other widths.
        """
        inputs, outputs = linear_widths(self.module)
        place = config.place
        if (place.inputs, place.outputs) != (inputs, outputs):
            raise ShapeError(
                f"{path}: entries of a weight of {(place.outputs, place.inputs)}, this base's is {(outputs, inputs)}"
            )
        return dict.fromkeys((INDEX, VALUE), (place.count,))

    def put(self, slot: str, config: Entries, path: str, adapter: Adapter) -> None:
        """See `Site.put`."""
        super().put(slot, config, path, adapter)
        try:
            check_index(self.index(slot), config.place)
        except ShapeError:
            self.drop(slot)
            raise

    def parts(self, slot: str) -> Sequence[str]:
        """The values: positions do not learn, and nothing stands in for them."""
        del slot
        return (VALUE,)

    def tensors(self, slot: str, path: str) -> dict[str, Tensor]:
        """See `Site.tensors`."""
        return {f"{path}.{INDEX}": self.index(slot).cpu().clone(), **super().tensors(slot, path)}

    def index(self, slot: str) -> Tensor:
        """The positions, [n]."""
        held = self.weights[slot]
        assert isinstance(held, nn.ParameterDict)
        found: Tensor = held[key_of(INDEX)]
        return found.detach()

    def matrix(self, slot: str) -> Tensor:
        """S of one adapter, [d_out, d_in]."""
        inputs, outputs = linear_widths(self.module)
        return dense(self.index(slot), self.get(slot, VALUE), (outputs, inputs))

    def _hook(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        route = self.route()
        selection = None if route is None else route.select(tuple(self.weights), output)
        if selection is None:
            return None
        changed = output
        for slot, part in selection.each():
            x, matrix = part.take(args[0]), self.matrix(slot)
            self.show(x)
            changed = part.add(changed, part.weighted(functional.linear(x.to(matrix.dtype), matrix)))
        return changed


def dense(index: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix with values [n] at positions [n] of its rows one after the other, which rise, and 0 elsewhere."""
    if len(value) == shape[0] * shape[1]:
        return value.view(shape)
    return value.new_zeros(shape[0] * shape[1]).scatter(0, index.long(), value).view(shape)


def check_index(index: Tensor, place: SparsePlace) -> None:
    """Refuse positions that are none, or not in order.

    Raises:
        ShapeError: If one is outside of the weight, not above the one before it, or they are not int32.
    """
    good = index.dtype == torch.int32 and bool((index[1:] > index[:-1]).all())
    if not good or int(index[0]) < 0 or int(index[-1]) >= place.inputs * place.outputs:
        raise ShapeError(
            f"{place.path}.{INDEX}: wanted rising int32 positions from 0 to {place.inputs * place.outputs - 1}; get "
            "the adapter again"
        )


def _places(config: SparseUpdateConfig) -> Iterable[tuple[str, AdapterConfig]]:
    """A site for S and one for the LoRA."""
    for place in config.sparse:
        yield place.path, Entries(targets=(place.path,), place=place)
    for path in () if config.low_rank is None else config.low_rank.targets:
        yield path, replace(config.low_rank or LoraConfig(), targets=(path,))


_SITES: Mapping[type[AdapterConfig], Callable[[PreTrainedModel, str, int], Any]] = {
    Entries: SparseSite,
    LoraConfig: LoraSite,
}


def _site(model: PreTrainedModel, path: str, owner: int, config: AdapterConfig) -> Any:
    return _SITES[type(config)](model, path, owner)


def _resolve(model: PreTrainedModel, config: SparseUpdateConfig) -> tuple[str, ...]:
    return linear_targets(model, config.targets or ("all",))


def _initial(
    model: PreTrainedModel, path: str, config: SparseUpdateConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """As many zeros as there are entries, evenly spread, and the LoRA as it starts: the model starts as the base."""
    fresh: dict[str, Tensor] = {}
    place = config.place_of(path)
    if place is not None:
        inputs, outputs = linear_widths(module_at(model, path)[1])
        step = max(1, inputs * outputs // place.count)
        fresh |= {INDEX: torch.arange(place.count, dtype=torch.int32) * step, VALUE: torch.zeros(place.count)}
    if config.low_rank is not None and path in config.low_rank.targets:
        fresh |= LORA.initial(model, path, config.low_rank, generator)
    return fresh


SPARSE_UPDATE = Method(
    name="sparse_update",
    title="Sparse update",
    paper="Guo et al. 2021, arXiv:2012.07463",
    config=SparseUpdateConfig,
    linear=True,
    site=_site,
    resolve=_resolve,
    initial=_initial,
    places=_places,
)
DIFF = replace(
    SPARSE_UPDATE, name="diff", title="Diff pruning", paper="Guo et al. 2021, arXiv:2012.07463", config=DiffConfig
)
SPT = replace(SPARSE_UPDATE, name="spt", title="SPT", paper="He et al. 2023, arXiv:2303.08566", config=SptConfig)
