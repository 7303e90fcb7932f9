"""The typed configuration of every adapter method. No torch: listing and `--help` read these too.

A method is a row in three places that share its name: its configuration here, its module in
`graftory/adapters/`, and its section in `docs/methods.md`. `hub train` derives its options from
the fields.
"""

from __future__ import annotations

from collections.abc import Mapping

from graftory.config.base import AdapterConfig, option
from graftory.config.bottleneck import (
    Activation,
    AdamixConfig,
    AdapterdropConfig,
    BottleneckConfig,
    CompacterConfig,
    NormedBottleneckConfig,
    Placement,
    PropetlConfig,
    SparseConfig,
)
from graftory.config.composed import (
    ComposedConfig,
    FusionConfig,
    FusionPlace,
    PromptConfig,
    PTuningConfig,
    Shape,
    SmopConfig,
    Track,
)
from graftory.config.conditional import Attends, CodaConfig
from graftory.config.hyperformer import HyperformerConfig, HyperPlace, HyperTask
from graftory.config.low_rank import (
    Biases,
    DoraConfig,
    DyloraConfig,
    LoraBiasConfig,
    LoraConfig,
    LowRankConfig,
    SoraConfig,
)
from graftory.config.peft import PEFT_CONFIGS
from graftory.config.pha import PhaConfig
from graftory.config.prefix import AptConfig, PrefixConfig, UnipeltConfig
from graftory.config.sparse_update import DiffConfig, SparsePlace, SparseUpdateConfig, SptConfig
from graftory.config.updates import BitfitConfig, Ia3Config, KronaConfig, UpdateConfig
from graftory.errors import ConfigError
from graftory.schema import Json, decode, encode

__all__ = [
    "CONFIGS",
    "Activation",
    "AdamixConfig",
    "AdapterConfig",
    "AdapterdropConfig",
    "AptConfig",
    "Attends",
    "Biases",
    "BitfitConfig",
    "BottleneckConfig",
    "CodaConfig",
    "CompacterConfig",
    "ComposedConfig",
    "DiffConfig",
    "DoraConfig",
    "DyloraConfig",
    "FusionConfig",
    "FusionPlace",
    "HyperPlace",
    "HyperTask",
    "HyperformerConfig",
    "Ia3Config",
    "KronaConfig",
    "LoraBiasConfig",
    "LoraConfig",
    "LowRankConfig",
    "NormedBottleneckConfig",
    "PTuningConfig",
    "PhaConfig",
    "Placement",
    "PrefixConfig",
    "PromptConfig",
    "PropetlConfig",
    "Shape",
    "SmopConfig",
    "SoraConfig",
    "SparseConfig",
    "SparsePlace",
    "SparseUpdateConfig",
    "SptConfig",
    "Track",
    "UnipeltConfig",
    "UpdateConfig",
    "config_from_json",
    "config_to_json",
    "option",
]

CONFIGS: Mapping[str, type[AdapterConfig]] = {
    kind.method: kind
    for kind in (
        LoraConfig,
        LoraBiasConfig,
        DoraConfig,
        Ia3Config,
        BitfitConfig,
        UpdateConfig,
        SparseUpdateConfig,
        PrefixConfig,
        AptConfig,
        BottleneckConfig,
        CompacterConfig,
        PropetlConfig,
        KronaConfig,
        UnipeltConfig,
        CodaConfig,
        DyloraConfig,
        SoraConfig,
        AdapterdropConfig,
        SparseConfig,
        AdamixConfig,
        DiffConfig,
        SptConfig,
        NormedBottleneckConfig,
        FusionConfig,
        SmopConfig,
        PromptConfig,
        PTuningConfig,
        HyperformerConfig,
        PhaConfig,
    )
} | {kind.method: kind for kind in PEFT_CONFIGS}
"""Every method that can be stored, by name."""


def config_to_json(config: AdapterConfig) -> Json:
    """The configuration with its method's name."""
    return {"method": config.method, **encode(config)}


def config_from_json(data: Json, where: str) -> AdapterConfig:
    """The inverse of `config_to_json`.

    Raises:
        ConfigError: If the method is unknown or a value does not fit.
    """
    method = data.get("method") if isinstance(data, dict) else None
    kind = CONFIGS.get(method) if isinstance(method, str) else None
    if kind is None:
        raise ConfigError(f"{where}: unknown adapter method {method!r}; known: {', '.join(CONFIGS)}")
    return decode(kind, {key: value for key, value in data.items() if key != "method"}, where)
