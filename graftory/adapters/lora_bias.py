"""LoRA with biases, as PEFT has it: y = W x + b' + s (B A x + c).

With `lora_bias` B has a bias c, scaled as B A is. With `bias` modules have a bias b' of their own: those with LoRA
(`lora_only`), or every linear layer and LayerNorm outside of the head (`all`). The product lies in the banks of plain
LoRA, so a mixed batch runs both at once; a row that mixes adapters gets Σ w of what each adds to the base, with b' − b.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from graftory.adapters.adding_site import VectorSite
from graftory.adapters.architectures import head_paths, is_linear, linear_widths, module_at
from graftory.adapters.banked_site import Used
from graftory.adapters.bitfit import bias_of
from graftory.adapters.lora import LORA, LoraSite
from graftory.adapters.method import Method
from graftory.adapters.targets import linear_targets
from graftory.config import AdapterConfig, LoraBiasConfig, LoraConfig, LowRankConfig
from graftory.errors import UnsupportedAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

A, B, UP_BIAS, OWN, BIAS = LoraBiasConfig.parts


@dataclass(frozen=True, slots=True, kw_only=True)
class UpBias(AdapterConfig):
    """c at one module."""

    method: ClassVar[str] = LoraBiasConfig.method
    parts: ClassVar[tuple[str, ...]] = (UP_BIAS,)
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnBias(AdapterConfig):
    """b' at a module with LoRA."""

    method: ClassVar[str] = LoraBiasConfig.method
    parts: ClassVar[tuple[str, ...]] = (OWN,)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoneBias(AdapterConfig):
    """b' at a module without."""

    method: ClassVar[str] = LoraBiasConfig.method
    parts: ClassVar[tuple[str, ...]] = (BIAS,)


class UpBiasSite(VectorSite[UpBias]):
    """s c of each adapter."""

    padded: ClassVar = {UP_BIAS: 0}

    def shapes(self, config: UpBias, path: str) -> Mapping[str, tuple[int, ...]]:
        """[d_out]."""
        del config, path
        return {UP_BIAS: (linear_widths(self.module)[1],)}

    def scale_of(self, config: UpBias, path: str) -> float:
        """See `BankedSite.scale_of`."""
        del path
        return config.scale

    def vectors(self, used: Used) -> Tensor:
        """See `VectorSite.vectors`."""
        return used.tensors[0] * used.scale[:, None].to(used.tensors[0].dtype)


class OwnBiasSite(VectorSite[AdapterConfig]):
    """b' - b of each adapter."""

    padded: ClassVar = {OWN: 0}

    def shapes(self, config: AdapterConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """[d], as the base's bias.

        Raises:
            UnsupportedAdapterError: If the module is no linear layer or LayerNorm, or has no bias.
        """
        if not _has_place(self.module):
            raise UnsupportedAdapterError(
                f"{path} is a {type(self.module).__name__}; graftory changes biases of linear layers and LayerNorms"
            )
        return dict.fromkeys(config.parts, tuple(bias_of(self.module, self.path).shape))

    def vectors(self, used: Used) -> Tensor:
        """See `VectorSite.vectors`."""
        return used.tensors[0] - bias_of(self.module, self.path).to(used.tensors[0].dtype)


class LoneBiasSite(OwnBiasSite):
    """The same where there is no LoRA."""

    padded: ClassVar = {BIAS: 0}


def _has_place(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, nn.LayerNorm)


def _has_bias(module: nn.Module) -> bool:
    return _has_place(module) and isinstance(getattr(module, "bias", None), Tensor)


def _places(config: LoraBiasConfig) -> Iterable[tuple[str, AdapterConfig]]:
    """A site for each thing at each target."""
    low_rank = {field.name: getattr(config, field.name) for field in fields(LowRankConfig)}
    for path in config.linears:
        yield path, LoraConfig(**{**low_rank, "targets": (path,)})
        if config.lora_bias:
            yield path, UpBias(targets=(path,), scale=config.scale_of(path))
    for path in config.biases:
        yield path, (LoneBias if path in config.bias_only else OwnBias)(targets=(path,))


_SITES: Mapping[type[AdapterConfig], Callable[[PreTrainedModel, str, int], Any]] = {
    LoraConfig: LoraSite,
    UpBias: UpBiasSite,
    OwnBias: OwnBiasSite,
    LoneBias: LoneBiasSite,
}


def _site(model: PreTrainedModel, path: str, owner: int, config: AdapterConfig) -> Any:
    return _SITES[type(config)](model, path, owner)


def _resolve(model: PreTrainedModel, config: LoraBiasConfig) -> tuple[str, ...]:
    return linear_targets(model, config.targets or ("qv",))


def _fill(model: PreTrainedModel, config: LoraBiasConfig) -> LoraBiasConfig:
    """Which biases there are."""
    linears, heads = config.targets, (*head_paths(model), "lm_head")
    own = [path for path in linears if config.bias != "none" and _has_bias(module_at(model, path)[1])]
    alone = [
        path
        for path, module in model.named_modules()
        if config.bias == "all" and _has_bias(module) and path not in linears and path.split(".")[0] not in heads
    ]
    return replace(config, targets=(*linears, *alone), biases=(*own, *alone), bias_only=tuple(alone))


def _initial(
    model: PreTrainedModel, path: str, config: LoraBiasConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """A and B as LoRA's, c zero, biases as the base's: the model starts as the base."""
    module = module_at(model, path)[1]
    fresh: dict[str, Tensor] = {}
    if path not in config.bias_only:
        fresh |= LORA.initial(model, path, config, generator)
        if config.lora_bias:
            fresh[UP_BIAS] = torch.zeros(linear_widths(module)[1])
    if path in config.biases:
        fresh[BIAS if path in config.bias_only else OWN] = bias_of(module, path).detach().float().cpu().clone()
    return fresh


LORA_BIAS = Method(
    name="lora_bias",
    title="LoRA with biases",
    paper="Hu et al. 2022, arXiv:2106.09685",
    config=LoraBiasConfig,
    linear=True,
    site=_site,
    resolve=_resolve,
    initial=_initial,
    places=_places,
    fill=_fill,
)
