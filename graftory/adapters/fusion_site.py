"""Places where adapters can be fused: the fusions of a site sit beside its plain adapters and see the same input."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor, nn

from graftory.adapter import Adapter
from graftory.adapters.banked_site import BankedSite
from graftory.adapters.fusion_math import Attention, Source, Sources, fuse
from graftory.adapters.route import Route, Selection
from graftory.config import AdapterConfig, FusionConfig, FusionPlace
from graftory.errors import AdapterNotFoundError, ShapeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

C = TypeVar("C", bound=AdapterConfig)


class Watcher(Protocol):
    """Something that is shown the attention of every fusion."""

    def __call__(self, owner: int, slot: str, place: FusionPlace, rows: Tensor | None, weights: Tensor) -> None:
        """Take weights [entries, ..., N]; entry i is row `rows[i]` of the batch, or row i if that is None."""


_WATCHER: ContextVar[Watcher | None] = ContextVar("graftory_attention", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Show a watcher the attention of the fusions that run inside the `with`, in this thread."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


class FusableSite(BankedSite[C]):
    """A site whose adapters can also be fused."""

    def __init__(self, model: PreTrainedModel, path: str, owner: int) -> None:
        super().__init__(model, path, owner)
        self.fused = nn.ModuleDict()
        self.fusions: dict[str, tuple[FusionPlace, FusionConfig]] = {}

    @abstractmethod
    def widths(self) -> tuple[int, int]:
        """What the adapters here read and what they add."""

    @abstractmethod
    def source(self, adapter: Adapter, path: str) -> Source:
        """The weights of a plain adapter here, under its own spelling of the path."""

    def put(self, slot: str, config: Any, path: str, adapter: Adapter) -> None:
        """See `Site.put`; of a fusion, `config` has the one place that is here.

        Raises:
            AdapterNotFoundError: If the adapters that a fusion works on are not with it.
        """
        if not isinstance(config, FusionConfig):
            super().put(slot, config, path, adapter)
            return
        place = config.places[0]
        check_sources(adapter, config)
        self._check_widths(place)
        parameters = nn.ParameterDict()
        for part, shape in place.shapes().items():
            parameters[part.replace(".", "_")] = self.fitting(adapter, path, part, shape)
        here = [self._source(adapter.sources[number], place.path) for number in place.sources]
        self.weights[slot] = parameters
        self.fusions[slot] = (place, config)
        dtype = next(parameters.parameters()).dtype
        self.fused[slot] = Sources(here, dtype).to(self.device())

    def drop(self, slot: str) -> None:
        """See `Site.drop`."""
        if slot in self.fusions:
            del self.weights[slot], self.fusions[slot], self.fused[slot]
        else:
            super().drop(slot)

    def parts(self, slot: str) -> Sequence[str]:
        """See `Site.parts`."""
        return tuple(self.fusions[slot][0].shapes()) if slot in self.fusions else super().parts(slot)

    def fused_selections(self, route: Route, x: Tensor) -> list[Selection]:
        """The entries that use fusions, one selection each."""
        found = [route.select((slot,), x) for slot in self.fusions]
        return [selection for selection in found if selection is not None]

    def fused_update(self, x: Tensor, selection: Selection) -> Tensor:
        """What one fusion adds, for inputs [entries, ..., d_in]."""
        (slot,) = selection.slots
        place, config = self.fusions[slot]
        sources, attention = self.fused[slot], Attention(*(self.get(slot, part) for part in place.shapes()))
        assert isinstance(sources, Sources)
        rows = x.to(attention.value.dtype).reshape(-1, x.shape[-1])
        update, weights = fuse(rows, sources, attention, config.dropout if self.training else 0.0)
        watcher = _WATCHER.get()
        if watcher is not None:
            seen = weights.detach().view(*x.shape[:-1], -1)
            watcher(self.owner, slot, place, selection.rows, seen)
        return selection.weighted(update.view(*x.shape[:-1], -1))

    def _source(self, adapter: Adapter, path: str) -> Source:
        spelt = next((target for target in adapter.spec.config.targets if same_module(target, path)), None)
        if spelt is None:
            raise ShapeError(f"a source of the fusion has no weights at {path}; attach the parents it was trained on")
        return self.source(adapter, spelt)

    def _check_widths(self, place: FusionPlace) -> None:
        if (place.inputs, place.outputs) != self.widths():
            raise ShapeError(
                f"{place.path}: the fusion is {place.inputs} x {place.outputs} wide, this base "
                f"{' x '.join(map(str, self.widths()))}; pass the base it was trained on"
            )


def check_sources(adapter: Adapter, config: FusionConfig) -> None:
    """Check that a fusion has its sources with it.

    Raises:
        AdapterNotFoundError: If one is missing.
    """
    if len(adapter.sources) == config.sources:
        return
    parents = [parent.ref for parent in adapter.spec.lineage.parents if parent.relation == "composed"]
    missing = ", ".join(parents[len(adapter.sources) :]) or "its parents"
    raise AdapterNotFoundError(
        f"the fusion works on {config.sources} adapters and has {len(adapter.sources)} with it: {missing} missing; "
        "get it with Hub.get from a hub that has its parents, or set Adapter.sources"
    )


def same_module(left: str, right: str) -> bool:
    """Whether two paths are equal but for the backbone's prefix in front of one of them."""
    return left == right or left == right.partition(".")[2] or right == left.partition(".")[2]


def named(tensors: Mapping[str, Tensor], path: str, parts: Sequence[str]) -> list[Tensor]:
    """Tensors of one adapter at one path.

    Raises:
        ShapeError: If one is missing.
    """
    for part in parts:
        if f"{path}.{part}" not in tensors:
            raise ShapeError(f"{path}.{part}: a source of the fusion lacks it; save that adapter again")
    return [tensors[f"{path}.{part}"] for part in parts]
