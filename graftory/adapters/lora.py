"""LoRA: y = W x + s B A x (Hu et al. 2022, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from graftory.adapter import Adapter
from graftory.adapters.architectures import linear_widths, module_at
from graftory.adapters.bank import Bank
from graftory.adapters.fusion_math import Source
from graftory.adapters.fusion_site import FusableSite, named
from graftory.adapters.method import Method
from graftory.adapters.route import Selection
from graftory.adapters.site import overheard
from graftory.adapters.targets import linear_targets
from graftory.config import LoraConfig
from graftory.kernels import batched_lora, inlet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

A, B = LoraConfig.parts


class LoraSite(FusableSite[LoraConfig]):
    """LoRA weights at one linear layer: A [r, d_in], B [d_out, r] of each adapter."""

    padded: ClassVar = {A: 0, B: 1}
    order: ClassVar[int] = -2

    def install(self, model: PreTrainedModel) -> None:
        """Add the update to what the linear layer returns, ahead of any bottleneck that reads it."""
        del model
        self.handles.append(self.module.register_forward_pre_hook(self._enter))
        self.listen(self._hook)

    def shapes(self, config: LoraConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """[r, d_in] and [d_out, r]."""
        inputs, outputs = linear_widths(self.module)
        rank = config.rank_of(path)
        return {A: (rank, inputs), B: (outputs, rank)}

    def widths(self) -> tuple[int, int]:
        """See `FusableSite.widths`."""
        return linear_widths(self.module)

    def source(self, adapter: Adapter, path: str) -> Source:
        """See `FusableSite.source`: s B A x, without dropout."""
        config = adapter.spec.config
        assert isinstance(config, LoraConfig)
        a, b = named(adapter.tensors, path, (A, B))
        return Source(a, b, config.scale_of(path))

    def scale_of(self, config: LoraConfig, path: str) -> float:
        """See `BankedSite.scale_of`."""
        return config.scale_of(path)

    def rate_of(self, config: LoraConfig) -> float:
        """See `BankedSite.rate_of`."""
        return config.dropout

    def _enter(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Where the gradients of the layer and of its updates meet."""
        if not torch.is_grad_enabled() or self.route() is None:
            return None
        return (inlet(args[0]), *args[1:])

    def _hook(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        route = self.route()
        if route is None:
            return None
        changed = output
        for bank, selection in self.selections(route, args[0]):
            for part in self._alike(selection):
                ours = changed is not output or not overheard()
                changed = self._changed(changed, args[0], bank, part, ours=ours)
        for selection in self.fused_selections(route, args[0]):
            changed = selection.add(changed, self.fused_update(selection.take(args[0]), selection))
        return None if changed is output else changed

    def _alike(self, selection: Selection) -> Iterable[Selection]:
        """The selection, in parts if adapters that a row mixes drop out different inputs."""
        dropped = self.training and any(self.configs[slot].dropout for slot in selection.slots)
        return selection.apart() if dropped else [selection]

    def _changed(self, output: Tensor, inputs: Tensor, bank: Bank, part: Selection, *, ours: bool) -> Tensor:
        """The output with what adapters add to it, in its own memory if that is `ours` to write to."""
        if part.rows is None and ours:
            return self._update(inputs, bank, part, output)
        return part.add(output, self._update(inputs, bank, part), fresh=True)

    def _update(self, inputs: Tensor, bank: Bank, selection: Selection, onto: Tensor | None = None) -> Tensor:
        """What the plain adapters add to their rows of the inputs; added, if `onto` is given; see `batched_lora`."""
        x = self.taken(inputs, selection)
        used = self.used(bank, selection)
        a, b, *_ = used.tensors
        return batched_lora(x, a, b, used.scale, used.routing, selection.weights, ranks=used.sizes, onto=onto)


def _resolve(model: PreTrainedModel, config: LoraConfig) -> tuple[str, ...]:
    return linear_targets(model, config.targets or ("qv",))


def _initial(model: PreTrainedModel, path: str, config: LoraConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """A uniform as `nn.Linear` draws it, B zero: the update is exactly zero at the start."""
    inputs, outputs = linear_widths(module_at(model, path)[1])
    rank = config.rank_of(path)
    a = torch.empty(rank, inputs)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    return {A: a, B: torch.zeros(outputs, rank)}


def _site(model: PreTrainedModel, path: str, owner: int, _: LoraConfig) -> LoraSite:
    return LoraSite(model, path, owner)


LORA = Method(
    name="lora",
    title="LoRA",
    paper="Hu et al. 2022, arXiv:2106.09685",
    config=LoraConfig,
    linear=True,
    site=_site,
    resolve=_resolve,
    initial=_initial,
)
