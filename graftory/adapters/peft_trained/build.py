"""PEFT's layers for an adapter, beside a model that stays as it is.

PEFT puts its layers in place of a model's modules. Here it does so in a skeleton: a model of nothing but the modules
that the adapter changes, each a second object around the same weights, without hooks. So PEFT's own code for every
method runs unchanged, and the model itself keeps its modules, names and bits.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftory.adapters.architectures import module_at
from graftory.config.peft import PeftConfig
from graftory.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX, ABOVE = "base_model.model.", "base_model."
"""What PEFT puts before the names of tensors: of a module, and of all modules together."""
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


_WHOLE = frozenset({"adalora", "lokr", "loha", "hra"})
"""Methods whose layers read or write what a quantised base does not have: weights or outputs as they were."""


def build(model: PreTrainedModel, config: PeftConfig, name: str, seed: int = 0) -> Any:
    """A `PeftModel` of a skeleton, with a fresh adapter in it.

    Args:
        model: The base model.
        config: The adapter's configuration, its targets explicit.
        name: What PEFT calls the adapter.
        seed: Seed of the fresh tensors.

    Raises:
        ConfigError: If PEFT does not do this method with this configuration on one of the modules.
        BaseMismatchError: If the model lacks a module.
    """
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    skeleton = nn.Module()
    for path in config.targets:
        _, module = module_at(model, path)
        _place(skeleton, path, bare(module))
    if config.method in _WHOLE and any(not weight.is_floating_point() for weight in skeleton.parameters()):
        raise ConfigError(
            f"{config.method} needs the base's own weights, and these are quantised; load the base unquantised, or "
            "train lora on it"
        )
    values = {**config.peft_values(), "target_modules": list(config.targets)}
    if config.transposes:
        values["fan_in_fan_out"] = any(isinstance(part, Conv1D) for part in skeleton.modules())
    # PEFT freezes what it finds, and these are the model's own weights
    learning = [(weight, weight.requires_grad) for weight in skeleton.parameters()]
    # PEFT warns of what it does by itself here, such as the module's own number of blocks
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            theirs = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(config.peft_type)](**values)
            return peft.PeftModel(skeleton, theirs, name)
        except (ValueError, TypeError, NotImplementedError, AssertionError) as error:
            said = " ".join(str(error).split())
            raise ConfigError(
                f"PEFT cannot do {config.method} so on {type(model).__name__} ({said:.240}); change its options, or "
                "give other targets"
            ) from error
        finally:
            for weight, learns in learning:
                weight.requires_grad_(learns)


def load(theirs: Any, name: str, tensors: Mapping[str, Tensor], shared: tuple[str, ...]) -> None:
    """Give PEFT's layers an adapter's tensors, by their names in `Adapter.tensors`.

    Raises:
        ShapeError: If one is missing, unknown or of another shape.
    """
    import peft

    wanted = {f"{ABOVE if key in shared else PREFIX}{key}": value for key, value in tensors.items()}
    try:
        peft.set_peft_model_state_dict(theirs, dict(wanted), adapter_name=name)
        known = set(state(theirs, name))
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise ShapeError(
            f"PEFT cannot load the tensors ({' '.join(str(error).split()):.300}); save the adapter again"
        ) from error
    odd = sorted(known ^ set(tensors))
    if odd:
        got, want = ("something", "nothing") if odd[0] in tensors else ("nothing", "a tensor")
        raise ShapeError(f"{odd[0]}: got {got}, wanted {want} for this base and configuration")


def state(theirs: Any, name: str) -> dict[str, Tensor]:
    """What PEFT would save, by the names in `Adapter.tensors`."""
    import peft

    with warnings.catch_warnings():
        # AdaLoRA may leave a module no rank at all
        warnings.filterwarnings("ignore", message=".*have invalid shape")
        saved: dict[str, Tensor] = peft.get_peft_model_state_dict(theirs, adapter_name=name)
    return {key.removeprefix(PREFIX if key.startswith(PREFIX) else ABOVE): value for key, value in saved.items()}


def bare(module: nn.Module) -> nn.Module:
    """A second object around a module's own weights and submodules, without its hooks."""
    twin = copy.copy(module)
    for hooks in _HOOKS:
        setattr(twin, hooks, OrderedDict())
    return twin


def _place(root: nn.Module, path: str, leaf: nn.Module) -> None:
    *parts, last = path.split(".")
    for part in parts:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, leaf)
