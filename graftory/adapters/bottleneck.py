"""Bottleneck adapters in three placements; h is a sublayer's output, x its residual input.

Houlsby (arXiv:1902.00751): h becomes h + U act(D h), after attention and after the FFN, then + x and on.
Pfeiffer (arXiv:2005.00247): with v = h + x behind the FFN, v becomes v + U act(D LN(v)), where LN is the
block's own LayerNorm, which then runs again on the sum; in pre-norm models, whose sum no norm follows, D reads
v itself. Parallel (arXiv:2110.04366): h becomes h + s U act(D x), beside the FFN. A sublayer's output is
taken before its dropout (AdapterHub takes it behind); in evaluation they are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from graftory.adapter import Adapter
from graftory.adapters.architectures import Architecture, matching, module_at, need_architecture
from graftory.adapters.bank import Bank
from graftory.adapters.banked_site import dropout_of
from graftory.adapters.expanded import Expanded
from graftory.adapters.expansions import EXPANSIONS
from graftory.adapters.fusion_math import Source
from graftory.adapters.fusion_site import FusableSite, named
from graftory.adapters.method import Method
from graftory.adapters.route import Selection
from graftory.adapters.site import Site, key_of
from graftory.config import Activation, BottleneckConfig, NormedBottleneckConfig, Placement
from graftory.errors import UnsupportedAdapterError
from graftory.kernels import batched_bottleneck

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DOWN, DOWN_BIAS, UP, UP_BIAS, NORM, NORM_BIAS = NormedBottleneckConfig.parts


class BottleneckSite(FusableSite[BottleneckConfig]):
    """Bottleneck weights at one site: D [size, d], c [size], U [d, size], e [d] of each adapter."""

    padded: ClassVar = {DOWN: 0, DOWN_BIAS: 0, UP: 1, UP_BIAS: 0}

    def __init__(self, model: PreTrainedModel, path: str, owner: int) -> None:
        super().__init__(model, path, owner)
        self.width = residual_width(model, path)
        self.expanded = nn.ModuleDict()
        """Places in the bank of adapters whose D and U are made at each use."""

    def put(self, slot: str, config: Any, path: str, adapter: Adapter) -> None:
        """See `Site.put`; what makes its D and U of other weights keeps those, and stands in the bank with its size."""
        kind = EXPANSIONS.get(type(config))
        if kind is None:
            super().put(slot, config, path, adapter)
            return
        first = config.targets[0]
        own = {
            part: self.fitting(adapter, path, part, shape)
            for part, shape in kind.shapes(config, path, self.width).items()
        }
        shared = {
            part: own[part] if part in own else self.fitting(adapter, first, part, shape)
            for part, shape in kind.shapes(config, first, self.width).items()
            if part in kind.shares
        }
        made = kind(own, shared)
        dense = {f"{path}.{part}": made[part].detach() for part in BottleneckConfig.parts}
        super().put(slot, config, path, Adapter(adapter.spec, dense))
        self.expanded[slot] = self.weights[slot].requires_grad_(False)
        self.weights[slot] = nn.ParameterDict({key_of(part): weight for part, weight in own.items()})
        self.made[slot] = made

    def join(self, slot: str, first: Site[Any]) -> None:
        """See `Site.join`: what only the first site has."""
        shared, made = first.made.get(slot), self.made.get(slot)
        if isinstance(shared, Expanded) and isinstance(made, Expanded):
            made.shared = shared.shared

    def standing_in(self, slot: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Site.standing_in`: D and U are made of these."""
        made = self.made.get(slot)
        return made.standing_in(tensors) if isinstance(made, Expanded) else tensors

    def drop(self, slot: str) -> None:
        """See `Site.drop`."""
        super().drop(slot)
        if slot in self.expanded:
            del self.expanded[slot], self.made[slot]

    def parts(self, slot: str) -> Sequence[str]:
        """See `Site.parts`; what all sites share is at the first one."""
        made = self.made.get(slot)
        return tuple(made.own) if isinstance(made, Expanded) else super().parts(slot)

    def shapes(self, config: BottleneckConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """[size, d], [size], [d, size], [d]."""
        size, width = config.size_of(path), self.width
        return {DOWN: (size, width), DOWN_BIAS: (size,), UP: (width, size), UP_BIAS: (width,)}

    def widths(self) -> tuple[int, int]:
        """See `FusableSite.widths`."""
        return self.width, self.width

    def source(self, adapter: Adapter, path: str) -> Source:
        """See `FusableSite.source`: s (U act(D u + c) + e), without dropout."""
        config = adapter.spec.config
        assert isinstance(config, BottleneckConfig)
        down, down_bias, up, up_bias = named(adapter.tensors, path, (DOWN, DOWN_BIAS, UP, UP_BIAS))
        return Source(down, up, config.scale, down_bias, up_bias, _activation(config.activation))

    def install(self, model: PreTrainedModel) -> None:
        """Read and change what the module returns."""
        del model
        self.listen(self._hook)

    def scale_of(self, config: BottleneckConfig, path: str) -> float:
        """See `BankedSite.scale_of`."""
        del path
        return config.scale

    def kind_of(self, config: BottleneckConfig) -> str:
        """One call has one activation."""
        return config.activation

    def changes(self, x: Tensor) -> list[tuple[Bank | None, Selection]]:
        """The rows to change: those of each bank, and of each fusion, which has none."""
        route = self.route()
        if route is None:
            return []
        return [*self.selections(route, x), *((None, selection) for selection in self.fused_selections(route, x))]

    def update(self, x: Tensor, bank: Bank | None, selection: Selection) -> Tensor:
        """What the adapters, or a fusion, add to the rows of a selection, for inputs [E, ..., d]."""
        if bank is None:
            return self.fused_update(x, selection)
        self.show(x)
        configs = [self.configs[slot] for slot in selection.slots]
        used = self.used(bank, selection)
        down, down_bias, up, up_bias, *_ = used.tensors
        keep = None
        if self.training:
            shape = (*x.shape[:-1], used.routing.index.shape[1] * down.shape[1])
            keep = dropout_of([config.dropout for config in configs], selection.index, shape)
        return batched_bottleneck(
            x, down, down_bias, up, up_bias, used.scale, used.routing, selection.weights,
            activation=configs[0].activation, keep=keep, sizes=used.sizes,
        )  # fmt: skip

    def _hook(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        del args
        hidden = output[0] if isinstance(output, tuple) else output
        changed = hidden
        for bank, selection in self.changes(hidden):
            changed = selection.add(
                changed, self.update(selection.take(hidden), bank, selection), fresh=bank is not None
            )
        if changed is hidden:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


class NormSite(BottleneckSite):
    """Pfeiffer in a post-norm model: LN(v) becomes LN(v + U act(D LN(v)))."""

    def _hook(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        changed = total = args[0]
        touched: list[Tensor] = []
        for bank, selection in self.changes(total):
            changed = selection.add(
                changed, self.update(selection.take(output), bank, selection), fresh=bank is not None
            )
            touched.append(_all_rows(total) if selection.rows is None else selection.rows)
        if not touched:
            return None
        rows = torch.unique(torch.cat(touched))
        # `forward`, not a call: this very hook must not run again
        again: Tensor = self.module.forward(changed.index_select(0, rows))
        return again if len(rows) == len(total) else output.index_copy(0, rows, again)


class ParallelSite(BottleneckSite):
    """Parallel to the FFN: the tap keeps the FFN's residual input until its output passes by."""

    def install(self, model: PreTrainedModel) -> None:
        """Tap the input of one module, change the output of another."""
        tap = model.get_submodule(_tap_of(model, self.path))
        self.handles.append(tap.register_forward_pre_hook(self._tap))
        super().install(model)

    def _tap(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        route = self.route()
        if route is not None:
            route.taps[self.path] = args[0]

    def _hook(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        del args
        route = self.route()
        x = route.taps.pop(self.path, None) if route else None
        if x is None:
            return None
        changed = output
        for bank, selection in self.changes(x):
            changed = selection.add(changed, self.update(selection.take(x), bank, selection), fresh=bank is not None)
        return changed


@cache
def _activation(name: Activation) -> Callable[[Tensor], Tensor]:
    """One object a name, so that neighbours of one activation are seen to have it in common."""
    act: Callable[[Tensor], Tensor] = ACT2FN[name]
    return act


def _all_rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0], device=x.device)


def residual_width(model: PreTrainedModel, path: str) -> int:
    """Width of the residual stream at a site: of the norm or linear layer there, or of the whole model."""
    module = model.get_submodule(path)
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        out = getattr(module, "out_features", None) or weight.shape[-1]
        return int(out)
    return int(model.config.hidden_size)


def placement_sites(model: PreTrainedModel, placement: Placement) -> tuple[str, ...]:
    """The module paths of a placement on a model, from the architecture table."""
    row = need_architecture(model)
    patterns: Mapping[Placement, tuple[str, ...]] = {
        "houlsby": row.sublayer_ends,
        "pfeiffer": row.last_norms + row.blocks,
        "parallel": tuple(out for _, out in row.ffns),
    }
    paths = [path for path, _ in model.named_modules()]
    return tuple(sorted(path for path, _ in matching(paths, patterns[placement])))


def _resolve(model: PreTrainedModel, config: BottleneckConfig) -> tuple[str, ...]:
    """The explicit sites; targets may pick some of the placement's sites by the end of their path."""
    sites = placement_sites(model, config.placement)
    if not config.targets:
        return sites
    chosen = {path for path, _ in matching(sites, config.targets)}
    unmet = [target for target in config.targets if not any(True for _ in matching(sites, [target]))]
    if unmet:
        raise UnsupportedAdapterError(
            f"target {unmet[0]!r} is no site of placement {config.placement!r}; sites: {', '.join(sites[:4])}, ..."
        )
    return tuple(sorted(chosen))


def _initial(
    model: PreTrainedModel, path: str, config: BottleneckConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """D uniform as `nn.Linear` draws it, U and both biases zero: the update is exactly zero at the start."""
    width, size = residual_width(model, module_at(model, path)[0]), config.size_of(path)
    down = torch.empty(size, width)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    return {DOWN: down, DOWN_BIAS: torch.zeros(size), UP: torch.zeros(width, size), UP_BIAS: torch.zeros(width)}


def _tap_of(model: PreTrainedModel, path: str) -> str:
    row: Architecture = need_architecture(model)
    paths = [name for name, _ in model.named_modules()]
    for tap, out in row.ffns:
        for site, layer in matching([path], [out]):
            return next(name for name, where in matching(paths, [tap]) if where == layer and site == path)
    raise UnsupportedAdapterError(f"{path!r} is no parallel site of {type(model).__name__}")


class NormedSite(BottleneckSite):
    """Houlsby's places, with a LayerNorm behind the bottleneck: h becomes h + LN(U act(D h + c) + e)."""

    padded: ClassVar = {**BottleneckSite.padded, NORM: 0, NORM_BIAS: 0}

    def shapes(self, config: BottleneckConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """As a plain one's, and the norm's [d], [d]."""
        return {**super().shapes(config, path), NORM: (self.width,), NORM_BIAS: (self.width,)}

    def source(self, adapter: Adapter, path: str) -> Source:
        """Refused: a fusion has no norms between its sources."""
        del path
        raise UnsupportedAdapterError(f"a {adapter.spec.method} adapter cannot be fused; train a plain one")

    def changes(self, x: Tensor) -> list[tuple[Bank | None, Selection]]:
        """See `BottleneckSite.changes`; adapters that a row mixes are normalised apart."""
        return [(bank, part) for bank, selection in super().changes(x) for part in selection.apart()]

    def update(self, x: Tensor, bank: Bank | None, selection: Selection) -> Tensor:
        """See `BottleneckSite.update`; each row is normalised with its own adapter's gain and shift."""
        assert bank is not None
        update = functional.layer_norm(super().update(x, bank, replace(selection, weights=None)), (self.width,))
        used = self.used(bank, selection)
        own, middle = used.routing.index[:, 0], [1] * (update.dim() - 2)
        gain, shift = (tensor[own].view(len(own), *middle, -1) for tensor in used.tensors[-2:])
        return selection.weighted(update * gain + shift)


def _normed_site(model: PreTrainedModel, path: str, owner: int, config: NormedBottleneckConfig) -> NormedSite:
    if config.placement != "houlsby":
        raise UnsupportedAdapterError(f"normed_bottleneck: got placement {config.placement!r}, wanted houlsby")
    return NormedSite(model, path, owner)


def _normed_initial(
    model: PreTrainedModel, path: str, config: NormedBottleneckConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    tensors = _initial(model, path, config, generator)
    width = tensors[UP_BIAS].shape[0]
    return {**tensors, NORM: torch.ones(width), NORM_BIAS: torch.zeros(width)}


def _site(model: PreTrainedModel, path: str, owner: int, config: BottleneckConfig) -> BottleneckSite:
    kinds: Mapping[Placement, type[BottleneckSite]] = {"houlsby": BottleneckSite, "parallel": ParallelSite}
    norm = config.placement == "pfeiffer" and bool(need_architecture(model).last_norms)
    return (NormSite if norm else kinds.get(config.placement, BottleneckSite))(model, path, owner)


BOTTLENECK = Method(
    name="bottleneck",
    title="Bottleneck adapter",
    paper="Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247; He et al. 2022, "
    "arXiv:2110.04366",
    config=BottleneckConfig,
    linear=False,
    site=_site,
    resolve=_resolve,
    initial=_initial,
)

NORMED_BOTTLENECK = Method(
    name="normed_bottleneck",
    title="Bottleneck adapter with a LayerNorm",
    paper="Karimi Mahabadi et al. 2021, arXiv:2106.04489",
    config=NormedBottleneckConfig,
    linear=False,
    site=_normed_site,
    resolve=_resolve,
    initial=_normed_initial,
)
