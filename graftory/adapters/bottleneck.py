"""Bottleneck adapters in three placements; h is a sublayer's output, x its residual input.

Houlsby (arXiv:1902.00751): h becomes h + U act(D h), after attention and after the FFN, then + x and on.
Pfeiffer (arXiv:2005.00247): with v = h + x behind the FFN, v becomes v + U act(D LN(v)), where LN is the
block's own LayerNorm, which then runs again on the sum; in pre-norm models, whose sum no norm follows, D reads
v itself. Parallel (arXiv:2110.04366): h becomes h + s U act(D x), beside the FFN. A sublayer's output is
taken before its dropout (AdapterHub takes it behind); in evaluation they are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from graftory.adapter import Adapter
from graftory.adapters.architectures import Architecture, matching, module_at, need_architecture
from graftory.adapters.fusion_math import Source
from graftory.adapters.fusion_site import FusableSite, named
from graftory.adapters.method import Method
from graftory.adapters.route import Route, Selection
from graftory.config import Activation, BottleneckConfig, NormedBottleneckConfig, Placement
from graftory.errors import UnsupportedAdapterError
from graftory.kernels import batched_bottleneck
from graftory.kernels.shapes import stack_padded

DOWN, DOWN_BIAS, UP, UP_BIAS, NORM, NORM_BIAS = NormedBottleneckConfig.parts


class BottleneckSite(FusableSite[BottleneckConfig]):
    """Bottleneck weights at one site: D [size, d], c [size], U [d, size], e [d] of each adapter."""

    def __init__(self, model: PreTrainedModel, path: str, owner: int) -> None:
        super().__init__(model, path, owner)
        self.width = residual_width(model, path)

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
        self.handles.append(self.module.register_forward_hook(self._hook))

    def select(self, x: Tensor) -> list[tuple[Route, Selection]]:
        """The entries for this site, one selection per activation and per dropout rate in use, and per fusion."""
        route = self.route()
        if route is None:
            return []
        kinds: dict[tuple[str, float], list[str]] = {}
        for slot, config in self.configs.items():
            kinds.setdefault((config.activation, config.dropout), []).append(slot)
        picked = [route.select(slots, x) for slots in kinds.values()]
        plain = [selection for selection in picked if selection is not None]
        return [(route, selection) for selection in (*plain, *self.fused_selections(route, x))]

    def update(self, x: Tensor, selection: Selection) -> Tensor:
        """What the adapters, or a fusion, add, for inputs [entries, ..., d]."""
        slots = selection.slots
        if slots[0] in self.fusions:
            return self.fused_update(x, selection)
        self.show(x)
        config = self.configs[slots[0]]
        act = ACT2FN[config.activation]
        rate = config.dropout if self.training else 0.0
        down = stack_padded([self.get(slot, DOWN) for slot in slots], dim=0)
        return batched_bottleneck(
            x,
            down,
            stack_padded([self.get(slot, DOWN_BIAS) for slot in slots], dim=0),
            stack_padded([self.get(slot, UP) for slot in slots], dim=1),
            stack_padded([self.get(slot, UP_BIAS) for slot in slots], dim=0),
            torch.tensor([self.configs[slot].scale for slot in slots], device=down.device),
            selection.index,
            (lambda hidden: functional.dropout(act(hidden), rate)) if rate else act,
        )

    def _hook(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        del args
        hidden = output[0] if isinstance(output, tuple) else output
        changed = hidden
        for _route, selection in self.select(hidden):
            changed = selection.add(changed, self.update(selection.take(hidden), selection))
        if changed is hidden:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


class NormSite(BottleneckSite):
    """Pfeiffer in a post-norm model: LN(v) becomes LN(v + U act(D LN(v)))."""

    def _hook(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        changed = total = args[0]
        touched: list[Tensor] = []
        for _route, selection in self.select(total):
            changed = selection.add(changed, self.update(selection.take(output), selection))
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
        for _route, selection in self.select(x):
            changed = selection.add(changed, self.update(selection.take(x), selection))
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

    def shapes(self, config: BottleneckConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """As a plain one's, and the norm's [d], [d]."""
        return {**super().shapes(config, path), NORM: (self.width,), NORM_BIAS: (self.width,)}

    def source(self, adapter: Adapter, path: str) -> Source:
        """Refused: a fusion has no norms between its sources."""
        del path
        raise UnsupportedAdapterError(f"a {adapter.spec.method} adapter cannot be fused; train a plain one")

    def update(self, x: Tensor, selection: Selection) -> Tensor:
        """See `BottleneckSite.update`; each entry is normalised with its own adapter's gain and shift."""
        update = functional.layer_norm(super().update(x, selection), (self.width,))
        gain, shift = (
            torch.stack([self.get(slot, part) for slot in selection.slots])[selection.index]
            for part in (NORM, NORM_BIAS)
        )
        middle = [1] * (update.dim() - gain.dim())
        return update * gain.view(len(gain), *middle, -1) + shift.view(len(shift), *middle, -1)


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
