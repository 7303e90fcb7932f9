"""DoRA: weights as magnitude and direction (Liu et al. 2024, arXiv:2402.09353).

With V = W + s B A and n its norms by output, y = (m / n) ⊙ V x + b. m starts as the norms of W and B at 0, so the model
starts as the base. Gradients take n for a constant, as the paper proposes (section 4.3) and PEFT does.

In a mixed batch every row has the m / n of its own adapter. Of a row that mixes adapters the updates add up, each
taken from the base: y + Σ w (y_k - y).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftory.adapters.adding_site import AddingSite
from graftory.adapters.architectures import linear_widths, module_at
from graftory.adapters.bank import Bank
from graftory.adapters.lora import LORA
from graftory.adapters.method import Method
from graftory.adapters.route import Selection
from graftory.adapters.targets import linear_targets
from graftory.config import DoraConfig
from graftory.errors import UnsupportedAdapterError
from graftory.kernels import batched_lora, batched_scale

if TYPE_CHECKING:
    from transformers import PreTrainedModel

A, B, MAGNITUDE = DoraConfig.parts


class DoraSite(AddingSite[DoraConfig]):
    """DoRA weights at one linear layer: A [r, d_in], B [d_out, r], m [d_out] of each adapter."""

    padded: ClassVar = {A: 0, B: 1, MAGNITUDE: 0}
    alone: ClassVar[bool] = True

    def shapes(self, config: DoraConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """[r, d_in], [d_out, r] and [d_out]."""
        inputs, outputs = linear_widths(self.module)
        rank = config.rank_of(path)
        return {A: (rank, inputs), B: (outputs, rank), MAGNITUDE: (outputs,)}

    def scale_of(self, config: DoraConfig, path: str) -> float:
        """See `BankedSite.scale_of`."""
        return config.scale_of(path)

    def rate_of(self, config: DoraConfig) -> float:
        """See `BankedSite.rate_of`; the base's part reads what is left too, as in PEFT."""
        return config.dropout

    def added(self, inputs: Tensor, output: Tensor, bank: Bank, selection: Selection) -> Tensor:
        """(m / n) ⊙ (W x + s B A x) - W x for the rows of a selection with one adapter each."""
        del output
        x = self.taken(inputs, selection)
        weight = linear_weight(self.module, self.path)
        used = self.used(bank, selection)
        a, b, _ = used.tensors
        direct = functional.linear(x, weight)
        moved = direct + batched_lora(x, a, b, used.scale, used.routing, None, ranks=used.sizes)
        factors = torch.stack([self._factor(bank, slot, weight) for slot in selection.slots])
        return batched_scale(moved, factors, selection.index[:, 0]) - direct

    def _factor(self, bank: Bank, slot: str, weight: Tensor) -> Tensor:
        """m / n of one adapter, [d_out]; n is a constant for gradients."""
        scale = bank.scales()[bank.place_of(slot)]
        return self.get(slot, MAGNITUDE) / norms(weight, self.get(slot, A), self.get(slot, B), scale)


def norms(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """n: the norm of each row of W + s B A, [d_out], without a graph."""
    with torch.no_grad():
        found: Tensor = torch.linalg.vector_norm(weight + scale * (b @ a), dim=1)
        return found


def linear_weight(module: nn.Module, path: str) -> Tensor:
    """W [d_out, d_in] of a linear layer, whichever way it keeps it.

    Raises:
        UnsupportedAdapterError: If its weight is quantised.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        raise UnsupportedAdapterError(
            f"{path} holds {weight.dtype}, and dora needs its norms; load the base unquantised"
        )
    return weight if isinstance(module, nn.Linear) else weight.T


def _resolve(model: PreTrainedModel, config: DoraConfig) -> tuple[str, ...]:
    return linear_targets(model, config.targets or ("qv",))


def _initial(model: PreTrainedModel, path: str, config: DoraConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """A and B as LoRA's, m the norms of W."""
    weight = linear_weight(module_at(model, path)[1], path).detach().float()
    start = LORA.initial(model, path, config, generator)
    return {**start, MAGNITUDE: norms(weight, start[A], start[B].to(weight), 1.0)}


def _site(model: PreTrainedModel, path: str, owner: int, _: DoraConfig) -> DoraSite:
    return DoraSite(model, path, owner)


DORA = Method(
    name="dora",
    title="DoRA",
    paper="Liu et al. 2024, arXiv:2402.09353",
    config=DoraConfig,
    linear=True,
    site=_site,
    resolve=_resolve,
    initial=_initial,
)
