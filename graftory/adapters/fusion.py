"""AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247): every token attends over the outputs of several adapters.

Wherever an adapter sits, its update z_n joins the base at one place; a fusion puts sum_n s_n V z_n there instead, with
s = softmax over n of (Q u + b) . K z_n and u what the adapters there read. Fusion is defined on outputs, so it
works for LoRA (at its linear layers, where Q is [d_out, d_in]) as for bottlenecks of any size, activation, scale and
placement. An adapter takes part at the places it has; LoRA and bottlenecks of one fusion meet where they sit together.
`fusion_math` has the formula, and how it is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.adapters.architectures import linear_widths, matching, module_at, need_architecture
from graftory.adapters.bottleneck import BOTTLENECK, residual_width
from graftory.adapters.fusion_site import FusableSite
from graftory.adapters.lora import LORA
from graftory.adapters.method import Method
from graftory.config import (
    AdapterConfig,
    BottleneckConfig,
    FusionConfig,
    FusionPlace,
    LoraConfig,
    Placement,
    Track,
)
from graftory.errors import UnsupportedAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPREAD = 0.02
"""Of Q and K, as in the paper's code."""
_OFF_DIAGONAL = 1e-6
"""Of V, as in the paper's code; on the diagonal it starts at 1."""


def fused_config(model: PreTrainedModel, sources: Sequence[Adapter], config: FusionConfig) -> FusionConfig:
    """The configuration of a fusion of adapters on a model: where which of them meet, and how wide it is there.

    Args:
        model: The base model.
        sources: The adapters, in order.
        config: Dropout and regularisation. Its targets, if any, keep only the places whose path ends in one.

    Raises:
        UnsupportedAdapterError: If a source is neither LoRA nor a bottleneck, there is none, or a target fits nothing.
        BaseMismatchError: If the model lacks a module of a source.
    """
    if not sources:
        raise UnsupportedAdapterError("nothing to fuse: give at least one adapter")
    seats: dict[tuple[str, Track], list[int]] = {}
    for number, adapter in enumerate(sources):
        for path in adapter.spec.config.targets:
            place = (module_at(model, path)[0], _track_of(adapter.spec.config))
            seats.setdefault(place, []).append(number)
    paths = sorted({path for path, _ in seats})
    if config.targets:
        chosen = {path for path, _ in matching(paths, config.targets)}
        unmet = [target for target in config.targets if not any(True for _ in matching(paths, [target]))]
        if unmet:
            raise UnsupportedAdapterError(
                f"target {unmet[0]!r} is no place of these adapters; places: {', '.join(paths[:4])}, ..."
            )
        paths = sorted(chosen)
    places = tuple(
        FusionPlace(path=path, track=track, sources=tuple(numbers), **_widths(model, path, track))
        for (path, track), numbers in sorted(seats.items())
        if path in paths
    )
    return replace(config, targets=tuple(paths), places=places, sources=len(sources))


def _track_of(config: AdapterConfig) -> Track:
    if isinstance(config, LoraConfig):
        return "lora"
    if type(config) is BottleneckConfig:
        return "parallel" if config.placement == "parallel" else "serial"
    raise UnsupportedAdapterError(
        f"a {config.method} adapter cannot be fused; fusion takes lora and bottleneck adapters"
    )


def _widths(model: PreTrainedModel, path: str, track: Track) -> dict[str, int]:
    if track == "lora":
        inputs, outputs = linear_widths(model.get_submodule(path))
        return {"inputs": inputs, "outputs": outputs}
    width = residual_width(model, path)
    return {"inputs": width, "outputs": width}


def _resolve(model: PreTrainedModel, config: FusionConfig) -> tuple[str, ...]:
    del model
    if not config.places:
        raise UnsupportedAdapterError("a fusion needs adapters to work on: see hub compose fusion")
    return config.targets


def _initial(model: PreTrainedModel, path: str, config: FusionConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Q and K normal with spread 0.02, no bias, V the identity with 1e-6 off the diagonal, as in the paper's code."""
    del model
    tensors: dict[str, Tensor] = {}
    for place in config.at(path):
        for part, shape in place.shapes().items():
            if part.endswith("bias"):
                tensors[part] = torch.zeros(shape)
            elif part.endswith("value.weight"):
                tensors[part] = torch.full(shape, _OFF_DIAGONAL).fill_diagonal_(1.0)
            else:
                tensors[part] = torch.empty(shape).normal_(0.0, _SPREAD, generator=generator)
    return tensors


def _places(config: FusionConfig) -> Iterable[tuple[str, AdapterConfig]]:
    return ((place.path, replace(config, places=(place,))) for place in config.places)


def _site(model: PreTrainedModel, path: str, owner: int, config: FusionConfig) -> FusableSite:  # type: ignore[type-arg]
    """The site that holds plain adapters at this place."""
    track = config.places[0].track
    if track == "lora":
        site = LORA.site(model, path, owner, LoraConfig())
    else:
        norm = any(True for _ in matching([path], need_architecture(model).last_norms))
        placement: Placement = "parallel" if track == "parallel" else "pfeiffer" if norm else "houlsby"
        site = BOTTLENECK.site(model, path, owner, BottleneckConfig(placement=placement))
    assert isinstance(site, FusableSite)
    return site


FUSION = Method(
    name="fusion",
    title="AdapterFusion",
    paper="Pfeiffer et al. 2021, arXiv:2005.00247",
    config=FusionConfig,
    linear=False,
    site=_site,
    resolve=_resolve,
    initial=_initial,
    places=_places,
)
