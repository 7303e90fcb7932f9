"""PEFT's `adapter_config.json` of LoRA and DoRA: what is read from it, what is refused, how ours is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from graftory.adapter import AdapterSpec
from graftory.config import Biases, DoraConfig, LoraBiasConfig, LoraConfig
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from graftory.hub.codecs.peft_common import (
    Accepted,
    PeftFile,
    Reader,
    as_file,
    common_values,
    is_bool,
    is_finite,
    keeps_transposed,
    opening,
    places,
    refuse_features,
)
from graftory.schema import Json

_INERT = {
    "eva_config",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "qalora_group_size",
}
"""Keys that change no number here."""
_READ = {
    "bias",
    "lora_bias",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "lora_dropout",
    "rank_pattern",
    "alpha_pattern",
}
_ACCEPTED: Accepted = {
    "init_lora_weights": lambda value: value in (None, True, False, "gaussian", "eva", "orthogonal"),
}
"""A `init_lora_weights` that changes the base (pissa, olora, corda, loftq, lora_ga) is none of them."""


@dataclass(frozen=True, slots=True)
class PeftLora(PeftFile):
    """What graftory reads of LoRA and DoRA."""

    rank: int
    alpha: float
    rslora: bool
    dora: bool
    dropout: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    bias: Biases
    lora_bias: bool

    def rank_of(self, path: str) -> int:
        """The rank that PEFT gives a module."""
        key = matching_key(self.rank_pattern, path)
        return self.rank if key is None else self.rank_pattern[key]

    def alpha_of(self, path: str) -> float:
        """The alpha that PEFT gives a module."""
        key = matching_key(self.alpha_pattern, path)
        return self.alpha if key is None else self.alpha_pattern[key]

    def scale_of(self, path: str) -> float:
        """The factor on B A at a module."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rslora else rank)


def matching_key(patterns: Mapping[str, object], path: str) -> str | None:
    """The first key that PEFT finds for a module: `(.*\\.)?(key)$`. Keys are literal paths, checked when read,
    in which a dot stands for any character; so nothing needs to be compiled."""
    ends = (path[at:] for at in range(len(path)) if at == 0 or path[at - 1] == ".")
    by_length = {len(end): end for end in ends}
    return next((key for key in patterns if len(key) in by_length and _fits(key, by_length[len(key)])), None)


def _fits(key: str, end: str) -> bool:
    return key == end or (
        (key[-1] in (".", end[-1])) and all(wanted in (".", got) for wanted, got in zip(key, end, strict=True))
    )


def read_config(data: Json, where: str) -> PeftLora:
    """Read `adapter_config.json`.

    Raises:
        CorruptAdapterError: If a value has the wrong type or is impossible.
        UnsupportedAdapterError: If a feature is used that graftory does not do; the key is named.
    """
    if not isinstance(data, dict):
        raise CorruptAdapterError(f"{where}: not a JSON object; save the adapter with PEFT again")
    if data.get("peft_type") != "LORA":
        raise UnsupportedAdapterError(f"{where}: peft_type is {data.get('peft_type')!r:.80}, wanted 'LORA'")
    refuse_features(data, where, known=_READ | _INERT, accepted=_ACCEPTED)
    read = Reader(data, where)
    return PeftLora(
        **common_values(read),
        rank=read.number("r", 8, _is_rank),
        alpha=float(read.number("lora_alpha", 8, is_finite)),
        rslora=read.number("use_rslora", False, is_bool),
        dora=read.number("use_dora", False, _is_switch) or False,
        dropout=float(read.number("lora_dropout", 0.0, _is_rate)),
        rank_pattern=read.pattern("rank_pattern", _is_rank),
        alpha_pattern=read.pattern("alpha_pattern", is_finite),
        bias=read.number("bias", "none", _is_bias) or "none",
        lora_bias=read.number("lora_bias", False, _is_switch) or False,
    )


def _is_rank(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_rate(value: Json) -> bool:
    return is_finite(value) and 0 <= value < 1


def _is_bias(value: Json) -> bool:
    return value in (None, "none", "lora_only", "all")


def _is_switch(value: Json) -> bool:
    return value is None or is_bool(value)


def write_config(spec: AdapterSpec) -> bytes:
    """Our `adapter_config.json`: explicit modules, ready for plain `PeftModel.from_pretrained`.

    Raises:
        UnsupportedAdapterError: If the specification is neither LoRA nor DoRA.
    """
    lora = spec.config
    if not isinstance(lora, LoraConfig | LoraBiasConfig | DoraConfig):
        raise UnsupportedAdapterError(f"method {spec.method!r} is not LoRA; PEFT's files cannot hold it so")
    linears = lora.linears if isinstance(lora, LoraBiasConfig) else lora.targets
    ranks = {path: lora.rank_of(path) for path in linears}
    alphas = {path: _whole(lora.alpha_pattern.get(path, lora.alpha)) for path in linears}
    bias = lora.bias if isinstance(lora, LoraBiasConfig) else "none"
    config = {
        **opening(spec, "LORA"),
        "r": lora.rank,
        "lora_alpha": _whole(lora.alpha),
        "use_rslora": lora.rslora,
        **({"use_dora": True} if isinstance(lora, DoraConfig) else {}),
        "lora_dropout": lora.dropout,
        **places(spec),
        "target_modules": list(linears),
        "rank_pattern": dict(_exceptions(ranks, lora.rank)),
        "alpha_pattern": dict(_exceptions(alphas, _whole(lora.alpha))),
        "bias": bias,
        **({"lora_bias": lora.lora_bias} if isinstance(lora, LoraBiasConfig) else {}),
        "fan_in_fan_out": keeps_transposed(spec),
        "init_lora_weights": True,
    }
    return as_file(config)


def _exceptions(values: Mapping[str, float], default: float) -> list[tuple[str, float]]:
    """The pattern of the modules that differ, longest path first because PEFT takes the first suffix
    that matches; of all modules where that would still catch a wrong one."""
    ordered = sorted(values.items(), key=lambda item: (-len(item[0]), item[0]))
    pattern = {path: value for path, value in ordered if value != default}
    found = {path: matching_key(pattern, path) for path in values}
    right = all((default if key is None else pattern[key]) == values[path] for path, key in found.items())
    return list(pattern.items()) if right else ordered


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value
