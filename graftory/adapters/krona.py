"""KronA: an update that is one Kronecker product (Edalati et al. 2022, arXiv:2212.10650).

y = W x + s (A ⊗ B) x, with A [p, f], B [f, q] for W [p f, f q]: as few numbers as a LoRA of rank 1 at the most, and a
rank of rank(A) rank(B). The product is never written out: with X [f, q] the inputs in rows, (A ⊗ B) x is A X Bᵀ.

f is the largest divisor of both widths that is not above `factor`. Fresh: A as `nn.Linear` draws it, B zero, as in
the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from graftory.adapters.adding_site import AddingSite
from graftory.adapters.architectures import linear_widths, module_at
from graftory.adapters.bank import Bank
from graftory.adapters.method import Method
from graftory.adapters.route import Selection
from graftory.adapters.targets import linear_targets
from graftory.config import KronaConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

A, B = KronaConfig.parts


def shapes_of(config: KronaConfig, inputs: int, outputs: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A and B at a linear layer."""
    common = math.gcd(inputs, outputs)
    f = max(each for each in range(1, min(config.factor, common) + 1) if common % each == 0)
    return (outputs // f, f), (f, inputs // f)


class KronaSite(AddingSite[KronaConfig]):
    """KronA weights at one linear layer: A [p, f], B [f, q] of each adapter."""

    padded: ClassVar = {A: 0, B: 1}
    alone: ClassVar[bool] = True

    def shapes(self, config: KronaConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """[p, f] and [f, q]."""
        del path
        return dict(zip((A, B), shapes_of(config, *linear_widths(self.module)), strict=True))

    def scale_of(self, config: KronaConfig, path: str) -> float:
        """See `BankedSite.scale_of`."""
        del path
        return config.strength

    def kind_of(self, config: KronaConfig) -> str:
        """One call has matrices of one shape."""
        return f"{shapes_of(config, *linear_widths(self.module))}"

    def rate_of(self, config: KronaConfig) -> float:
        """See `BankedSite.rate_of`."""
        return config.dropout

    def added(self, inputs: Tensor, output: Tensor, bank: Bank, selection: Selection) -> Tensor:
        """s (A ⊗ B) x for the rows of a selection with one adapter each."""
        del output
        x = self.taken(inputs, selection)
        used = self.used(bank, selection)
        own = used.routing.index[:, 0]
        a, b = (tensor[own] for tensor in used.tensors)
        rows = x.to(a.dtype).reshape(len(own), -1, b.shape[1], b.shape[2])
        made = torch.einsum("epf,enfq,egq->enpg", a, rows, b) * used.scale[own].to(a.dtype).view(-1, 1, 1, 1)
        return made.reshape(*x.shape[:-1], -1)


def _resolve(model: PreTrainedModel, config: KronaConfig) -> tuple[str, ...]:
    return linear_targets(model, config.targets or ("qv",))


def _initial(model: PreTrainedModel, path: str, config: KronaConfig, generator: torch.Generator) -> dict[str, Tensor]:
    first, second = shapes_of(config, *linear_widths(module_at(model, path)[1]))
    a = torch.empty(first)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    return {A: a, B: torch.zeros(second)}


def _site(model: PreTrainedModel, path: str, owner: int, _: KronaConfig) -> KronaSite:
    return KronaSite(model, path, owner)


KRONA = Method(
    name="krona",
    title="KronA",
    paper="Edalati et al. 2022, arXiv:2212.10650",
    config=KronaConfig,
    linear=True,
    site=_site,
    resolve=_resolve,
    initial=_initial,
)
