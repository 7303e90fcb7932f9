"""Updates of weights and biases as they are: what merges of unlike adapters give, and LoRA with a bias.

A linear layer that returns W x + b returns (W + ΔW) x + b + Δb with ΔW = B A + diag(p) W + W diag(q). LoRA is B A, DoRA
is B A and p, (IA)³ is p and Δb, or q, BitFit is Δb; so every weighted sum of them is exactly of this form, without a
matrix as large as W. A row that mixes adapters gets the sum of their updates, each times its weight. Norms, and linear
layers of which nothing else changes, have Δb alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from graftory.adapters.adding_site import AddingSite, VectorSite, beside
from graftory.adapters.architectures import linear_widths
from graftory.adapters.bank import Bank
from graftory.adapters.banked_site import summed
from graftory.adapters.bitfit import bias_of
from graftory.adapters.dora import linear_weight
from graftory.adapters.method import Method
from graftory.adapters.route import Selection
from graftory.adapters.targets import linear_targets
from graftory.config import UpdateConfig
from graftory.kernels import batched_lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

A, B, ROWS, COLUMNS, BIAS = UpdateConfig.parts


class UpdateSite(AddingSite[UpdateConfig]):
    """Updates at one linear layer: A [r, d_in], B [d_out, r], p [d_out], q [d_in], Δb [d_out] of each adapter."""

    padded: ClassVar = {A: 0, B: 1, ROWS: 0, COLUMNS: 0, BIAS: 0}

    def shapes(self, config: UpdateConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """[r, d_in], [d_out, r], [d_out], [d_in] and [d_out]."""
        inputs, outputs = linear_widths(self.module)
        rank = config.rank_of(path)
        return {A: (rank, inputs), B: (outputs, rank), ROWS: (outputs,), COLUMNS: (inputs,), BIAS: (outputs,)}

    def added(self, inputs: Tensor, output: Tensor, bank: Bank, selection: Selection) -> Tensor:
        """Σ w (B A x + p ⊙ (W x) + W (q ⊙ x) + Δb) for the rows of a selection."""
        del output
        x = self.taken(inputs, selection)
        used = self.used(bank, selection)
        a, b, *vectors = used.tensors
        update = batched_lora(x, a, b, used.scale, used.routing, selection.weights, ranks=used.sizes)
        mixed = (summed(vector, used.routing.index, selection.weights) for vector in vectors)
        rows, columns, bias = (beside(vector, x).to(x.dtype) for vector in mixed)
        configs = [self.configs[slot] for slot in selection.slots]
        if any(config.rows for config in configs):
            update = update + rows * functional.linear(x, linear_weight(self.module, self.path))
        if any(config.columns for config in configs):
            update = update + functional.linear(columns * x, linear_weight(self.module, self.path))
        return update + bias


class BiasSite(VectorSite[UpdateConfig]):
    """What is added to the bias of one module, where nothing else changes: Δb [d] of each adapter."""

    padded: ClassVar = {BIAS: 0}

    def shapes(self, config: UpdateConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """[d], as the bias."""
        del config, path
        return {BIAS: tuple(bias_of(self.module, self.path).shape)}

    def parts(self, slot: str) -> Sequence[str]:
        """See `Site.parts`."""
        del slot
        return (BIAS,)


def _resolve(model: PreTrainedModel, config: UpdateConfig) -> tuple[str, ...]:
    return linear_targets(model, config.targets or ("qv",))


def _initial(model: PreTrainedModel, path: str, config: UpdateConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Zeros: it comes from merges, not from training."""
    del generator
    site = _site(model, path, 0, config)
    return {part: torch.zeros(shape) for part, shape in site.shapes(config, path).items()}


def _site(model: PreTrainedModel, path: str, owner: int, config: UpdateConfig) -> UpdateSite | BiasSite:
    return (BiasSite if path in config.bias_only else UpdateSite)(model, path, owner)


def _places(config: UpdateConfig) -> list[tuple[str, UpdateConfig]]:
    """A site for each target, of its own kind."""
    return [
        (path, replace(config, targets=(path,), bias_only=(path,) if path in config.bias_only else ()))
        for path in config.targets
    ]


UPDATE = Method(
    name="update",
    title="Update of weights and biases",
    paper="Ilharco et al. 2023, arXiv:2212.04089",
    config=UpdateConfig,
    linear=True,
    site=_site,
    resolve=_resolve,
    initial=_initial,
    places=_places,
)
