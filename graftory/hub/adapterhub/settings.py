"""AdapterHub's configurations: what is read of them, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

from graftory.config import Activation
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from graftory.hub.adapterhub.names import ACTIVATIONS, CONFIG, KINDS, RENAMED, BottleneckKind
from graftory.schema import Json

Settings = Mapping[str, Json]

_FIXED_BOTTLENECK: Settings = {
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
    "cross_adapter": False,
    "inv_adapter": None,
    "phm_layer": False,
    "use_gating": False,
}
_FREE_BOTTLENECK = {
    "dropout",
    "factorized_phm_W",
    "factorized_phm_rule",
    "hypercomplex_nonlinearity",
    "init_weights",
    "init_weights_seed",
    "inv_adapter_reduction_factor",
    "is_parallel",
    "learn_phm",
    "leave_out",
    "mh_adapter",
    "non_linearity",
    "original_ln_before",
    "output_adapter",
    "phm_bias",
    "phm_c_init",
    "phm_dim",
    "phm_init_range",
    "phm_rank",
    "reduction_factor",
    "scaling",
    "shared_W_phm",
    "shared_phm_rule",
    "stochastic_depth",
}
_FIXED_LORA: Settings = {
    "architecture": "lora",
    "composition_mode": "add",
    "dtype": None,
    "use_dora": False,
    "use_gating": False,
    "vera_b": None,
    "vera_d": None,
}
_FREE_LORA = {
    "alpha",
    "attn_matrices",
    "dropout",
    "init_weights",
    "init_weights_seed",
    "intermediate_lora",
    "leave_out",
    "output_lora",
    "r",
    "selfattn_lora",
}
"""Fixed: values that another would change the numbers of. Free: read, only for training, or told by the tensors."""


def is_lora(config: Settings) -> bool:
    """Whether the adapter is of LoRA's family; a bottleneck has no architecture."""
    return config.get("architecture") is not None


def check_lora(config: Settings) -> None:
    """Check that a configuration asks for no more than plain LoRA.

    Raises:
        UnsupportedAdapterError: If it does; the key is named.
    """
    _check(config, _FIXED_LORA, _FREE_LORA)


def bottleneck_kind(config: Settings) -> BottleneckKind:
    """Which kind of bottleneck a configuration is.

    Raises:
        UnsupportedAdapterError: If it is none; the key is named.
    """
    _check(config, _FIXED_BOTTLENECK, _FREE_BOTTLENECK)
    for kind in KINDS:
        if all(config.get(key, False) == value for key, value in kind.says.items()):
            return kind
    raise UnsupportedAdapterError(
        f"{CONFIG}: is_parallel with original_ln_before is none of {', '.join(kind.name for kind in KINDS)}"
    )


def activation_of(config: Settings, *, versioned: bool) -> Activation:
    """The non-linearity, by our name.

    Raises:
        UnsupportedAdapterError: If we have none of that name.
    """
    said = config.get("non_linearity")
    name = said.lower() if isinstance(said, str) else ""
    name = name if versioned else RENAMED.get(name, name)
    if name not in ACTIVATIONS:
        raise UnsupportedAdapterError(f"{CONFIG}: non_linearity is {said!r:.80}, graftory has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def number(config: Settings, key: str, default: float, valid: Callable[[Any], bool]) -> float:
    """A number of a configuration.

    Raises:
        UnsupportedAdapterError: If it is learned, or impossible.
    """
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not valid(value):
        raise UnsupportedAdapterError(f"{CONFIG}: {key} is {value!r:.80}, wanted a number that fits")
    return float(value)


def section(data: Json, where: str) -> dict[str, Json]:
    """An object.

    Raises:
        CorruptAdapterError: If it is something else.
    """
    if not isinstance(data, dict):
        raise CorruptAdapterError(f"{where}: not a JSON object; save the adapter with AdapterHub again")
    return data


def _check(config: Settings, fixed: Settings, free: Set[str]) -> None:
    for key, value in config.items():
        off = value in (None, False, [], {})
        if key in free or (value == fixed[key] if key in fixed else off):
            continue
        shown = key if key.isidentifier() and len(key) <= 80 else f"{key!r:.80}"
        raise UnsupportedAdapterError(
            f"{CONFIG}: {shown} = {value!r:.80} is something graftory does not do; train without it"
        )
