"""Sites that add something to what their module returns."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, TypeVar

from torch import Tensor, nn

from graftory.adapters.bank import Bank
from graftory.adapters.banked_site import BankedSite, Used, summed
from graftory.adapters.route import Selection
from graftory.config import AdapterConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

C = TypeVar("C", bound=AdapterConfig)


class AddingSite(BankedSite[C]):
    """Adds to the rows of its adapters, others keep their bits; like LoRA, ahead of any bottleneck that reads them."""

    order: ClassVar[int] = -2
    alone: ClassVar[bool] = False
    """Whether `added` takes one adapter a row; then it is called for each place of a mixture, and weighted."""

    def install(self, model: PreTrainedModel) -> None:
        """Add to what the module returns."""
        del model
        self.listen(self._hook)

    @abstractmethod
    def added(self, inputs: Tensor, output: Tensor, bank: Bank, selection: Selection) -> Tensor:
        """What is added to the rows of a selection, given what the module read and returned, all rows of it."""

    def _hook(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        route = self.route()
        changed = output
        for bank, selection in self.selections(route, output) if route is not None else ():
            for part in selection.apart() if self.alone else (selection,):
                update = self.added(args[0], output, bank, part)
                changed = part.add(changed, part.weighted(update) if self.alone else update)
        return None if changed is output else changed


class VectorSite(AddingSite[C]):
    """Adds a vector [d] of each adapter: Σ w of those of a row's adapters."""

    # behind a bottleneck at the same LayerNorm, which runs the norm again without hooks
    order: ClassVar[int] = 1

    def vectors(self, used: Used) -> Tensor:
        """Of each adapter, [K, d]."""
        return used.tensors[0]

    def added(self, inputs: Tensor, output: Tensor, bank: Bank, selection: Selection) -> Tensor:
        """See `AddingSite.added`."""
        del inputs
        used = self.used(bank, selection)
        rows = selection.take(output)
        return beside(summed(self.vectors(used), used.routing.index, selection.weights), rows).expand_as(rows)


def beside(vectors: Tensor, rows: Tensor) -> Tensor:
    """[E, d] as [E, 1, ..., d], to go with rows [E, ..., D] at every position."""
    return vectors.view(len(vectors), *[1] * (rows.dim() - 2), -1)
