"""The rows of PEFT's own methods in the table of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftory.adapters.architectures import architecture_of, head_paths, is_linear, module_at
from graftory.adapters.method import Method
from graftory.adapters.peft_trained.site import places, site, whole
from graftory.adapters.targets import linear_targets, paths_of
from graftory.config.peft import (
    AdaloraConfig,
    FourierftConfig,
    HraConfig,
    LnTuningConfig,
    LohaConfig,
    LokrConfig,
    OftConfig,
    PeftConfig,
    VbloraConfig,
    VeraConfig,
)
from graftory.errors import UnsupportedAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _linears(model: PreTrainedModel, config: PeftConfig) -> tuple[str, ...]:
    """Queries and values by default, as for LoRA.

    Raises:
        UnsupportedAdapterError: If the layers are GPT-2's, which keep W the other way round, and PEFT does not do that.
    """
    targets = linear_targets(model, config.targets or ("qv",))
    odd = [path for path in targets if not isinstance(module_at(model, path)[1], nn.Linear)]
    if odd and not config.transposes:
        raise UnsupportedAdapterError(
            f"{odd[0]} is a {type(module_at(model, odd[0])[1]).__name__}, and PEFT does {config.method} on Linear "
            "alone; take lora, adalora, vera, vblora or fourierft on this base"
        )
    return targets


def _norms(model: PreTrainedModel, config: PeftConfig) -> tuple[str, ...]:
    """Every norm of the backbone, or those that the targets pick."""
    heads = head_paths(model)
    found = [path for path, module in model.named_modules() if _is_norm(module) and path.split(".")[0] not in heads]
    if not found:
        raise UnsupportedAdapterError(f"{type(model).__name__} has no norm with a gain to train; take lora")
    chosen: list[str] = []
    for target in config.targets:
        picked = paths_of(target, architecture_of(model), found)
        if not picked:
            raise UnsupportedAdapterError(
                f"target {target!r} fits no norm of {type(model).__name__}; leave it out for all of them, or give the "
                f"end of a module path, such as {found[0]}"
            )
        chosen += picked
    return tuple(sorted(set(chosen))) if config.targets else tuple(sorted(found))


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("Norm")
    return named and isinstance(weight, Tensor) and weight.dim() == 1 and not is_linear(module)


def _one(model: PreTrainedModel, path: str, config: PeftConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """The fresh tensors of an adapter with one target, by part."""
    fresh = whole(model, replace(config, targets=(path,)), generator)
    return {key.removeprefix(f"{path}."): value for key, value in fresh.items()}


def _row(
    config: type[PeftConfig],
    title: str,
    paper: str,
    resolve: Callable[[PreTrainedModel, Any], tuple[str, ...]] = _linears,
) -> Method:
    return Method(
        name=config.method,
        title=title,
        paper=paper,
        config=config,
        linear=True,
        site=site,
        resolve=resolve,
        initial=_one,
        places=places,
        whole=whole,
    )


PEFT_METHODS: Sequence[Method] = (
    _row(AdaloraConfig, "AdaLoRA", "Zhang et al. 2023, arXiv:2303.10512"),
    _row(LokrConfig, "LoKr", "Yeh et al. 2024, arXiv:2309.14859"),
    _row(LohaConfig, "LoHa", "Hyeon-Woo et al. 2022, arXiv:2108.06098"),
    _row(VeraConfig, "VeRA", "Kopiczko et al. 2024, arXiv:2310.11454"),
    _row(VbloraConfig, "VB-LoRA", "Li et al. 2024, arXiv:2405.15179"),
    _row(FourierftConfig, "FourierFT", "Gao et al. 2024, arXiv:2405.03003"),
    _row(OftConfig, "OFT", "Qiu et al. 2023, arXiv:2306.07280"),
    _row(HraConfig, "HRA", "Yuan et al. 2024, arXiv:2405.17484"),
    _row(LnTuningConfig, "LN tuning", "Zhao et al. 2024, arXiv:2312.11420", _norms),
)
"""The methods that PEFT trains and runs."""
