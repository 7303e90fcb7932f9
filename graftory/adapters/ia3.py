"""(IA)³: learned vectors scale keys, values and the FFN's hidden units (Liu et al. 2022, arXiv:2205.05638).

At a linear layer y = W x + b an adapter has one vector l. Keys and values: y becomes l ⊙ y, bias included. The FFN's
second layer: x becomes l ⊙ x, so that its hidden units are scaled. l starts at 1, so the model starts as the base.

A row that mixes adapters is scaled by 1 + Σ w (l - 1): what the adapters change adds up, as it does for LoRA, and one
adapter at weight 1 is that adapter. What LoRA adds to y at the same layer is scaled with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from graftory.adapters.architectures import architecture_of, linear_widths, matching, module_at
from graftory.adapters.bank import Bank
from graftory.adapters.banked_site import BankedSite, summed
from graftory.adapters.method import Method
from graftory.adapters.route import Selection
from graftory.adapters.targets import linear_targets
from graftory.config import Ia3Config
from graftory.kernels import batched_scale

if TYPE_CHECKING:
    from transformers import PreTrainedModel

(VECTOR,) = Ia3Config.parts


class Ia3Site(BankedSite[Ia3Config]):
    """Vectors at one linear layer that scale what it returns: l [d_out, 1] of each adapter."""

    padded: ClassVar = {VECTOR: 0}
    order: ClassVar[int] = -1

    def install(self, model: PreTrainedModel) -> None:
        """Scale what the linear layer returns, behind LoRA."""
        del model
        self.listen(self._hook)

    def shapes(self, config: Ia3Config, path: str) -> Mapping[str, tuple[int, ...]]:
        """[d_out, 1], as in PEFT."""
        del config, path
        return {VECTOR: (linear_widths(self.module)[1], 1)}

    def scaled(self, x: Tensor) -> Tensor | None:
        """The rows of x [N, ..., D] times their vectors, others as they are; None if no row has any."""
        route = self.route()
        found = [] if route is None else self.selections(route, x)
        if not found:
            return None
        bank, selection = found[0]
        if len(found) == 1 and selection.weights is None and selection.index.shape[1] == 1:
            used = self.used(bank, selection)
            return batched_scale(
                x, used.tensors[0].flatten(1), _over_batch(selection, used.routing.index[:, 0], len(x))
            )
        return self._mixed(x, found)

    def _mixed(self, x: Tensor, found: Sequence[tuple[Bank, Selection]]) -> Tensor:
        """As `scaled`, with a vector 1 + Σ w (l - 1) for every row."""
        vectors = x.new_ones(len(x), x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
        index = torch.full((len(x),), -1, device=x.device)
        rows = torch.arange(len(x), device=x.device)
        for bank, selection in found:
            used = self.used(bank, selection)
            more = summed(used.tensors[0].flatten(1) - 1, used.routing.index, selection.weights)
            vectors = selection.add(vectors, more)
            index = torch.maximum(index, _over_batch(selection, selection.take(rows), len(x)))
        return batched_scale(x, vectors, index)

    def _hook(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        del args
        return self.scaled(output)


class Ia3InputSite(Ia3Site):
    """Vectors at one linear layer that scale what it reads: l [1, d_in] of each adapter."""

    padded: ClassVar = {VECTOR: 1}

    def install(self, model: PreTrainedModel) -> None:
        """Scale what the linear layer reads."""
        del model
        self.handles.append(self.module.register_forward_pre_hook(self._pre_hook))

    def shapes(self, config: Ia3Config, path: str) -> Mapping[str, tuple[int, ...]]:
        """[1, d_in], as in PEFT."""
        del config, path
        return {VECTOR: (1, linear_widths(self.module)[0])}

    def _pre_hook(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        scaled = self.scaled(args[0])
        return None if scaled is None else (scaled, *args[1:])


def _over_batch(selection: Selection, values: Tensor, batch: int) -> Tensor:
    """A number for each row of the batch: the selection's own, else -1."""
    if selection.rows is None:
        return values
    return values.new_full((batch,), -1).index_copy(0, selection.rows, values)


def _resolve(model: PreTrainedModel, config: Ia3Config) -> tuple[str, ...]:
    """Keys, values (in GPT-2 the one layer that makes queries too) and the FFN's second layer by default."""
    if config.targets:
        return linear_targets(model, config.targets)
    row = architecture_of(model)
    roles = [role for role in ("k", "v", "qkv", "down") if row and role in row.linears]
    return linear_targets(model, roles or ("all",))


def _fill(model: PreTrainedModel, config: Ia3Config) -> Ia3Config:
    row = architecture_of(model)
    second = {path for path, _ in matching(config.targets, row.linears["down"])} if row else set()
    return replace(config, feedforward=tuple(path for path in config.targets if path in second))


def _places(config: Ia3Config) -> Iterable[tuple[str, Ia3Config]]:
    """A site for each target, of its own kind."""
    for path in config.targets:
        yield path, replace(config, targets=(path,), feedforward=(path,) if path in config.feedforward else ())


def _initial(model: PreTrainedModel, path: str, config: Ia3Config, generator: torch.Generator) -> dict[str, Tensor]:
    """Ones: the model starts as the base."""
    del generator
    inputs, outputs = linear_widths(module_at(model, path)[1])
    return {VECTOR: torch.ones((1, inputs) if path in config.feedforward else (outputs, 1))}


def _site(model: PreTrainedModel, path: str, owner: int, config: Ia3Config) -> Ia3Site:
    return (Ia3InputSite if config.feedforward else Ia3Site)(model, path, owner)


IA3 = Method(
    name="ia3",
    title="(IA)³",
    paper="Liu et al. 2022, arXiv:2205.05638",
    config=Ia3Config,
    linear=True,
    site=_site,
    resolve=_resolve,
    initial=_initial,
    places=_places,
    fill=_fill,
)
