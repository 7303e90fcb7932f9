"""A bottleneck beside an FFN that does what the FFN does, as more hidden units of the FFN itself: exactly.

The FFN is h = W₂ act(W₁ x + b₁) + b₂; a parallel bottleneck of size r (arXiv:2110.04366) adds s (U act(D x + c) + e).
With the same activation and the same input x both are one FFN of width d_ff + r:

    W₁' = [W₁; D], b₁' = [b₁; c], W₂' = [W₂, s U], b₂' = b₂ + s e.

It holds where the norm comes behind the FFN's sum (BERT, RoBERTa, ELECTRA, DistilBERT): there FFN and bottleneck both
read the residual stream. In models whose norm comes first (GPT-2, T5, Llama, ViT) the bottleneck reads the stream
before the norm and the FFN behind it, and a gated FFN multiplies two products: neither can be widened. A configuration
has one width for all layers, so all become as wide as the widest; units that stand for nothing are zero, and
act(0) = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftory.adapter import Adapter
from graftory.adapters.architectures import Architecture, architecture_of, matching, module_at
from graftory.config import BottleneckConfig
from graftory.errors import ShapeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WIDTHS = ("intermediate_size", "hidden_dim")
"""What configurations call d_ff."""
_ACTIVATIONS = ("hidden_act", "activation")
"""What they call the FFN's activation."""
_SAME: Mapping[str, str] = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new"}
"""Other names of the activations that bottlenecks know."""
_DOWN, _DOWN_BIAS, _UP, _UP_BIAS = BottleneckConfig.parts

Make = Callable[[Callable[[str], Tensor], torch.dtype], Tensor]
Changes = dict[str, tuple[tuple[int, ...], Make]]


@dataclass(frozen=True, slots=True)
class _Ffn:
    """One FFN of a model, by the paths of its two layers."""

    first: str
    second: str
    same_input: bool
    """Whether a parallel bottleneck reads what the FFN reads."""
    gated: bool


def widened(model: PreTrainedModel, adapter: Adapter) -> tuple[Changes, Mapping[str, int], str | None]:
    """Plan the widening of a model's FFNs; the model may be on the device `meta`.

    Args:
        model: The base.
        adapter: An adapter of it, of any method.

    Returns:
        New shapes and makers by the names of the parameters; what changes in the configuration; and, if it cannot be
        done, why not, to be put behind a sentence, empty if the method has nothing to do with it.
    """
    config = adapter.spec.config
    if type(config) is not BottleneckConfig:
        return {}, {}, ""
    why = _why_not(model, config)
    if why is not None:
        return {}, {}, f" (more hidden units of the FFN can: {why})"
    ffns = list(_ffns(model))
    found = {module_at(model, path)[0]: path for path in config.targets}
    extra = max((config.size_of(path) for path in config.targets), default=0)
    changes: Changes = {}
    for ffn in ffns:
        changes |= _wider(model, ffn, extra, adapter, found.get(ffn.second))
    name = _named(model.config, _WIDTHS)
    assert name is not None
    return changes, {name: getattr(model.config, name) + extra}, None


def _why_not(model: PreTrainedModel, config: BottleneckConfig) -> str | None:
    if config.placement != "parallel":
        return f"this one is placed {config.placement}, wanted parallel"
    ffns = {ffn.second: ffn for ffn in _ffns(model)}
    for path in config.targets:
        ffn = ffns.get(module_at(model, path)[0])
        if ffn is None:
            return f"{path} is no FFN of two linear layers"
        if ffn.gated:
            return "the FFN is gated"
        if not ffn.same_input:
            return f"in {model.config.model_type} it reads the stream before the norm, the FFN behind it"
        if model.get_submodule(ffn.first).bias is None or model.get_submodule(ffn.second).bias is None:
            return "the FFN has no bias for the bottleneck's"
    own = getattr(model.config, _named(model.config, _ACTIVATIONS) or "", None)
    if _SAME.get(str(own), own) != config.activation:
        return f"its activation is {config.activation}, the FFN's {own}"
    return None if _named(model.config, _WIDTHS) else f"{model.config.model_type} does not say the width of its FFN"


def _named(config: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if hasattr(config, name)), None)


def _ffns(model: PreTrainedModel) -> Iterator[_Ffn]:
    row: Architecture | None = architecture_of(model)
    if row is None:
        return
    paths = [path for path, _ in model.named_modules()]
    firsts = {layer: path for path, layer in matching(paths, row.linears["up"])}
    gated = {layer for _, layer in matching(paths, row.linears.get("gate", ()))}
    taps = {layer: path for tap, _ in row.ffns for path, layer in matching(paths, [tap])}
    for second, layer in matching(paths, row.linears["down"]):
        first = firsts.get(layer)
        if first is not None:
            yield _Ffn(first, second, first.startswith(f"{taps.get(layer)}."), layer in gated)


def _wider(model: PreTrainedModel, ffn: _Ffn, extra: int, adapter: Adapter, path: str | None) -> Changes:
    """One FFN, with `extra` more units; those of the adapter, if it has any here, come first."""
    first, second = model.get_submodule(ffn.first), model.get_submodule(ffn.second)
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    width = first.out_features + extra
    config = adapter.spec.config
    assert isinstance(config, BottleneckConfig)
    tensors = {part: adapter.tensors[f"{path}.{part}"] for part in BottleneckConfig.parts} if path else {}
    if path is not None and tensors[_DOWN].shape[1] != first.in_features:
        raise ShapeError(
            f"{path}: a bottleneck of {tuple(tensors[_DOWN].shape)} beside an FFN that reads {first.in_features}"
        )
    changes: Changes = {
        f"{ffn.first}.weight": (
            (width, first.in_features),
            partial(_beside, ffn.first, 0, extra, tensors.get(_DOWN), 1.0),
        ),
        f"{ffn.second}.weight": (
            (second.out_features, width),
            partial(_beside, ffn.second, 1, extra, tensors.get(_UP), config.scale),
        ),
    }
    changes[f"{ffn.first}.bias"] = (
        (width,),
        partial(_beside, ffn.first, 0, extra, tensors.get(_DOWN_BIAS), 1.0, part="bias"),
    )
    if path is not None:
        changes[f"{ffn.second}.bias"] = (
            (second.out_features,),
            partial(_added, ffn.second, tensors[_UP_BIAS], config.scale),
        )
    return changes


def _beside(
    module: str,
    dim: int,
    extra: int,
    added: Tensor | None,
    scale: float,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    *,
    part: str = "weight",
) -> Tensor:
    """[old, scale added, 0] along a dimension."""
    old = read(f"{module}.{part}")
    shape = list(old.shape)
    shape[dim] += extra
    new = torch.zeros(shape, dtype=dtype)
    new.narrow(dim, 0, old.shape[dim]).copy_(old)
    if added is not None:
        new.narrow(dim, old.shape[dim], added.shape[dim]).copy_(scale * added.double())
    return new


def _added(module: str, vector: Tensor, scale: float, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    return (read(f"{module}.bias").double() + scale * vector.double()).to(dtype)
