"""UniPELT: LoRA, prefixes and bottlenecks in every layer, each behind a gate (Mao et al. 2022, arXiv:2110.07577).

A gate is one number for each row of a batch and each place: g = the mean over the row's tokens of σ(w·h_t + b). LoRA
at the queries and values: y + g s B A x, h the layer's input. Prefix: P_k and P_v times g, h the same. Bottleneck
behind the FFN: u + g (U act(D u + c) + e), h the FFN's output u. (The paper has one gate for the LoRA of a layer;
here each module has its own.) w and b start at 0, so that all gates start at ½.

The mean is over the tokens that the attention mask shows: a row has the same gates whatever it is padded to. It sees
the whole text, so encoders alone can have it. A row takes one such adapter at weight 1, beside any others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from graftory.adapters.architectures import linear_widths, matching, module_at, need_architecture
from graftory.adapters.bank import Bank
from graftory.adapters.banked_site import Used
from graftory.adapters.bottleneck import BOTTLENECK, BottleneckSite, residual_width
from graftory.adapters.lora import LORA, LoraSite
from graftory.adapters.method import Method
from graftory.adapters.prefix import PREFIX
from graftory.adapters.prefix_reading import ReadingPrefixSite, encoder_attentions
from graftory.adapters.route import Selection
from graftory.adapters.targets import linear_targets
from graftory.adapters.text_mask import MaskReading
from graftory.config import AdapterConfig, BottleneckConfig, LoraConfig, PrefixConfig, UnipeltConfig
from graftory.errors import UnsupportedAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GATE, GATE_BIAS = UnipeltConfig.parts[-2:]


class Gated(MaskReading[Any]):
    """What the three kinds of sites share: gates, and the mask of the batch."""

    inputs: int
    """Width of what gates read."""

    def gate_shapes(self) -> dict[str, tuple[int, ...]]:
        """w [d] and b [1]."""
        return {GATE: (self.inputs,), GATE_BIAS: (1,)}

    def gates(self, x: Tensor, used: Used, selection: Selection) -> Tensor:
        """The gate of each row of a selection with one adapter each, [E], for h [E, tokens, d].

        Raises:
            RouteError: If the mask of the batch is not known, or is of another length.
        """
        own = used.routing.index[:, 0]
        weight, bias = (tensor[own].to(x.dtype) for tensor in used.tensors[-2:])
        each = torch.sigmoid(torch.einsum("esd,ed->es", x, weight) + bias)
        mask = self.mask_for(x.shape[1], UnipeltConfig.method)
        if mask is None:
            return each.mean(1)
        seen = selection.take(mask).to(x.dtype)
        return (each * seen).sum(1) / seen.sum(1).clamp(min=1)


class GatedLoraSite(Gated, LoraSite):
    """LoRA at one linear layer, and its gates."""

    padded: ClassVar = {**LoraSite.padded, GATE: 0, GATE_BIAS: 0}

    def install(self, model: PreTrainedModel) -> None:
        """See `LoraSite.install`."""
        self.listen_to_mask(model)
        super().install(model)

    def shapes(self, config: LoraConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """As LoRA's, and the gate's."""
        self.inputs = linear_widths(self.module)[0]
        return {**super().shapes(config, path), **self.gate_shapes()}

    def parts(self, slot: str) -> Sequence[str]:
        """See `Site.parts`."""
        return (*super().parts(slot), GATE, GATE_BIAS)

    def _alike(self, selection: Selection) -> Iterable[Selection]:
        return selection.apart()

    def _update(self, inputs: Tensor, bank: Bank, selection: Selection, onto: Tensor | None = None) -> Tensor:
        gates = self.gates(selection.take(inputs), self.used(bank, selection), selection)
        update = super()._update(inputs, bank, selection) * gates[:, None, None]
        return update if onto is None else onto + update


class GatedBottleneckSite(Gated, BottleneckSite):
    """A bottleneck behind the FFN, and its gates."""

    padded: ClassVar = {**BottleneckSite.padded, GATE: 0, GATE_BIAS: 0}

    def install(self, model: PreTrainedModel) -> None:
        """See `BottleneckSite.install`."""
        self.listen_to_mask(model)
        super().install(model)

    def shapes(self, config: BottleneckConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """As a bottleneck's, and the gate's."""
        self.inputs = self.width
        return {**super().shapes(config, path), **self.gate_shapes()}

    def parts(self, slot: str) -> Sequence[str]:
        """See `Site.parts`."""
        return (*super().parts(slot), GATE, GATE_BIAS)

    def changes(self, x: Tensor) -> list[tuple[Bank | None, Selection]]:
        """See `BottleneckSite.changes`; adapters that a row mixes have gates of their own."""
        return [(bank, part) for bank, selection in super().changes(x) for part in selection.apart()]

    def update(self, x: Tensor, bank: Bank | None, selection: Selection) -> Tensor:
        """See `BottleneckSite.update`."""
        assert bank is not None
        gates = self.gates(x, self.used(bank, selection), selection)
        return super().update(x, bank, selection) * gates[:, None, None]


class GatedPrefixSite(Gated, ReadingPrefixSite):
    """Prefixes at one attention, and their gates."""

    padded: ClassVar = {**ReadingPrefixSite.padded, GATE: 0, GATE_BIAS: 0}

    def install(self, model: PreTrainedModel) -> None:
        """See `ReadingPrefixSite.install`."""
        self.listen_to_mask(model)
        super().install(model)

    def shapes(self, config: PrefixConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """As a prefix's, and the gate's."""
        self.inputs = int(self.model.config.hidden_size)
        return {**super().shapes(config, path), **self.gate_shapes()}

    def parts(self, slot: str) -> Sequence[str]:
        """See `Site.parts`."""
        return (*super().parts(slot), GATE, GATE_BIAS)

    def vectors(self, used: Used, selection: Selection) -> tuple[Tensor, Tensor]:
        """See `PrefixSite.vectors`: times the gates."""
        keys, values = super().vectors(used, selection)
        gates = self.gates(self.read(selection), used, selection)[:, None, None]
        return keys * gates, values * gates


def part_of(config: UnipeltConfig, path: str) -> AdapterConfig:
    """What sits at one place."""
    seed = config.init_seed
    if path in config.attentions:
        return PrefixConfig(targets=(path,), init_seed=seed, length=config.length, spread=config.spread)
    if path in config.ends:
        size, activation = config.size, config.activation
        return BottleneckConfig(targets=(path,), init_seed=seed, placement="houlsby", size=size, activation=activation)
    return LoraConfig(targets=(path,), init_seed=seed, rank=config.rank, alpha=config.alpha)


_KINDS: Mapping[type[AdapterConfig], tuple[Method, type[Gated]]] = {
    LoraConfig: (LORA, GatedLoraSite),
    PrefixConfig: (PREFIX, GatedPrefixSite),
    BottleneckConfig: (BOTTLENECK, GatedBottleneckSite),
}


def _places(config: UnipeltConfig) -> Iterator[tuple[str, AdapterConfig]]:
    return ((path, part_of(config, path)) for path in config.targets)


def _ends(model: PreTrainedModel) -> list[str]:
    outs = [out for _, out in need_architecture(model).ffns]
    return [path for path, _ in matching((name for name, _ in model.named_modules()), outs)]


def _resolve(model: PreTrainedModel, config: UnipeltConfig) -> tuple[str, ...]:
    """Queries, values, attentions and FFNs of all layers."""
    if config.targets:
        raise UnsupportedAdapterError("unipelt sits in every layer; leave the targets out")
    return tuple(
        sorted({*encoder_attentions(model, UnipeltConfig.method), *_ends(model), *linear_targets(model, ("q", "v"))})
    )


def _fill(model: PreTrainedModel, config: UnipeltConfig) -> UnipeltConfig:
    attentions = encoder_attentions(model, UnipeltConfig.method)
    return replace(config, attentions=attentions, ends=tuple(sorted(_ends(model))))


def _initial(model: PreTrainedModel, path: str, config: UnipeltConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Each as its own method draws it, and gates at ½."""
    part = part_of(config, path)
    name, module = module_at(model, path)
    widths = {LoraConfig: lambda: linear_widths(module)[0], BottleneckConfig: lambda: residual_width(model, name)}
    width = widths.get(type(part), lambda: int(model.config.hidden_size))()
    tensors = _KINDS[type(part)][0].initial(model, path, part, generator)
    return {**tensors, GATE: torch.zeros(width), GATE_BIAS: torch.zeros(1)}


def _site(model: PreTrainedModel, path: str, owner: int, config: AdapterConfig) -> Gated:
    return _KINDS[type(config)][1](model, path, owner)


UNIPELT = Method(
    name="unipelt",
    title="UniPELT",
    paper="Mao et al. 2022, arXiv:2110.07577",
    config=UnipeltConfig,
    linear=False,
    site=_site,
    resolve=_resolve,
    initial=_initial,
    places=_places,
    fill=_fill,
)
