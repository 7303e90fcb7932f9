"""Updates of weights and biases as they are: what merges of unlike adapters give, and LoRA with a bias.

A linear layer that returns W x + b returns (W + ΔW) x + b + Δb with ΔW = B A + diag(p) W + W diag(q). LoRA is B A, DoRA
is B A and p, (IA)³ is p and Δb, or q, BitFit is Δb; so every weighted sum of them is exactly of this form, without a
matrix as large as W. A row that mixes adapters gets the sum of their updates, each times its weight. Norms, and linear
layers of which nothing else changes, have Δb alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from graftory.adapters.architectures import linear_widths
from graftory.adapters.bank import Bank
from graftory.adapters.banked_site import BankedSite, summed
from graftory.adapters.bitfit import bias_of
from graftory.adapters.dora import linear_weight
from graftory.adapters.method import Method
from graftory.adapters.route import Selection
from graftory.adapters.targets import linear_targets
from graftory.config import UpdateConfig
from graftory.kernels import batched_lora

A, B, ROWS, COLUMNS, BIAS = UpdateConfig.parts


class UpdateSite(BankedSite[UpdateConfig]):
    """Updates at one linear layer: A [r, d_in], B [d_out, r], p [d_out], q [d_in], Δb [d_out] of each adapter."""

    padded: ClassVar = {A: 0, B: 1, ROWS: 0, COLUMNS: 0, BIAS: 0}
    order: ClassVar[int] = -2

    def install(self, model: PreTrainedModel) -> None:
        """Add to what the linear layer returns, as LoRA does."""
        del model
        self.listen(self._hook)

    def shapes(self, config: UpdateConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """[r, d_in], [d_out, r], [d_out], [d_in] and [d_out]."""
        inputs, outputs = linear_widths(self.module)
        rank = config.rank_of(path)
        return {A: (rank, inputs), B: (outputs, rank), ROWS: (outputs,), COLUMNS: (inputs,), BIAS: (outputs,)}

    def _hook(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        route = self.route()
        changed = output
        for bank, selection in self.selections(route, output) if route is not None else ():
            changed = selection.add(changed, self._update(args[0], bank, selection))
        return None if changed is output else changed

    def _update(self, inputs: Tensor, bank: Bank, selection: Selection) -> Tensor:
        """Σ w (B A x + p ⊙ (W x) + W (q ⊙ x) + Δb) for the rows of a selection."""
        x = selection.take(inputs)
        self.show(x)
        used = self.used(bank, selection)
        a, b, *vectors = used.tensors
        update = batched_lora(x, a, b, used.scale, used.routing, selection.weights, ranks=used.sizes)
        rows, columns, bias = (_each(vector, used.index, selection.weights, x) for vector in vectors)
        configs = [self.configs[slot] for slot in selection.slots]
        if any(config.rows for config in configs):
            update = update + rows * functional.linear(x, linear_weight(self.module, self.path))
        if any(config.columns for config in configs):
            update = update + functional.linear(columns * x, linear_weight(self.module, self.path))
        return update + bias


class BiasSite(BankedSite[UpdateConfig]):
    """What is added to the bias of one module, where nothing else changes: Δb [d] of each adapter."""

    padded: ClassVar = {BIAS: 0}
    # behind a bottleneck at the same LayerNorm, as BitFit is
    order: ClassVar[int] = 1

    def install(self, model: PreTrainedModel) -> None:
        """Add to what the module returns."""
        del model
        self.listen(self._hook)

    def shapes(self, config: UpdateConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """[d], as the bias."""
        del config, path
        return {BIAS: tuple(bias_of(self.module, self.path).shape)}

    def parts(self, slot: str) -> Sequence[str]:
        """See `Site.parts`."""
        del slot
        return (BIAS,)

    def _hook(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        del args
        route = self.route()
        changed = output
        for bank, selection in self.selections(route, output) if route is not None else ():
            used = self.used(bank, selection)
            rows = selection.take(output)
            more = _each(used.tensors[0], used.index, selection.weights, rows)
            changed = selection.add(changed, more.expand_as(rows))
        return None if changed is output else changed


def _each(vectors: Tensor, index: Tensor, weights: Tensor | None, x: Tensor) -> Tensor:
    """The weighted sum of each row's vectors, [E, 1, ..., d], beside inputs [E, ..., d]."""
    found = summed(vectors, index, weights)
    return found.view(len(found), *[1] * (x.dim() - 2), -1).to(x.dtype)


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
