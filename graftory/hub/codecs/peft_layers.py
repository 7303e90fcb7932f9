"""The methods that PEFT itself trains and runs, in PEFT's files: one reading and one writing for all of them.

What is written is what `save_pretrained` writes, key for key and in its layout; only `target_modules` is a sorted list
of explicit paths.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from graftory.adapter import AdapterSpec
from graftory.config.base import AdapterConfig
from graftory.config.peft import PEFT_CONFIGS, PeftConfig, peft_fields
from graftory.errors import ConfigError, CorruptAdapterError, UnsupportedAdapterError
from graftory.hub.codecs import tensors as shared
from graftory.hub.codecs.peft_common import (
    PeftFile,
    Reader,
    common_values,
    keeps_transposed,
    opening,
    places,
    refuse_features,
)
from graftory.hub.codecs.peft_config import matching_key
from graftory.hub.codecs.peft_kind import CONFIG, WEIGHTS, PeftKind, Stored
from graftory.schema import Json, decode

_INERT = {"exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform"}
_VERSION = "0.21.2"
"""Of PEFT, whose layout it is, where the adapter was made without it: its reading of OFT asks for one."""
_STARTS = {"init_weights", "init_lora_weights"}
"""How fresh tensors were drawn: saved ones have been drawn."""


@dataclass(frozen=True, slots=True)
class PeftLayers(PeftFile):
    """What graftory reads of a method that PEFT runs."""

    values: Mapping[str, Json]
    """Fields of the configuration, by our names."""
    patterns: Mapping[str, Mapping[str, Json]]
    """Those of them that hold values of single modules, by plain paths or ends of paths."""


def kind_of(config: type[PeftConfig]) -> PeftKind:
    """The row of a method in the table of PEFT's."""
    fields = dict(peft_fields(config))

    def read(data: Json, where: str) -> PeftLayers:
        accepted = {key: _equal(value) for key, value in config.fixed.items() if key not in _INERT | _STARTS}
        refuse_features(data, where, known={*fields.values(), *_INERT, *_STARTS}, accepted=accepted)
        reader = Reader(data, where)
        values = {name: data[key] for name, key in fields.items() if key in data}
        patterns = {name: reader.pattern(fields[name], lambda _: True) for name in config.patterns}
        return PeftLayers(**common_values(reader), values=values, patterns=patterns)

    def made(file: PeftLayers, body: Stored) -> PeftConfig:
        paths = _paths(config, body)
        explicit = {name: _explicit(pattern, paths) for name, pattern in file.patterns.items()}
        try:
            return decode(config, {**file.values, **explicit, "targets": list(paths), "init_seed": None}, CONFIG)
        except ConfigError as error:
            raise CorruptAdapterError(f"{error}; correct the file, or save the adapter with PEFT again") from None

    def check(file: PeftLayers, body: Stored, said: PeftConfig) -> None:
        found = made(file, body)
        ours, theirs = said.peft_values(), found.peft_values()
        for name, key in fields.items():
            if ours[key] != theirs[key]:
                raise CorruptAdapterError(
                    f"{CONFIG}: {key} is {theirs[key]!r:.80}, {name} of the specification {ours[key]!r:.80}; save both "
                    "again"
                )

    return PeftKind(config.peft_type, read, made, check, _write, config.shared, config.may_be_empty)


def _explicit(pattern: Mapping[str, Json], paths: Sequence[str]) -> dict[str, Json]:
    """The value of each module that has one of its own, by its whole path."""
    found = {path: matching_key(pattern, path) for path in paths}
    return {path: pattern[key] for path, key in found.items() if key is not None}


def _equal(wanted: Json) -> Callable[[Json], bool]:
    return lambda value: value == wanted or value in (None, False, [], {})


def _paths(config: type[PeftConfig], body: Stored) -> tuple[str, ...]:
    """The modules; refuses tensors that the method does not explain."""
    missing = [name for name in config.shared if name not in body]
    if missing:
        raise UnsupportedAdapterError(
            f"{WEIGHTS}: no tensor base_model.{missing[0]}; graftory keeps what all modules share in the file, so save "
            "it there (VeRA: save_projection=True)"
        )
    own = [key for key in body if key not in config.shared]
    refusal = f"{WEIGHTS}: tensor %r is not understood; graftory reads {', '.join(config.parts)} and modules_to_save"
    paths = shared.paths_of(own, config.parts, refusal)
    if not paths:
        raise CorruptAdapterError(
            f"{WEIGHTS}: no {config.method} tensor in the file; wanted <module>.{config.parts[0]}"
        )
    for path in paths:
        parts = tuple(part for part in config.parts if f"{path}.{part}" in body)
        if parts not in config.forms:
            wanted = " or ".join(", ".join(one) for one in config.forms)
            raise CorruptAdapterError(f"{WEIGHTS}: {path!r} has {', '.join(parts)}, wanted {wanted}")
    return paths


def _write(spec: AdapterSpec) -> bytes:
    config = spec.config
    assert isinstance(config, PeftConfig)
    made = {
        "auto_mapping": None,
        "peft_version": spec.lineage.libraries.get("peft", _VERSION),
        **({"fan_in_fan_out": keeps_transposed(spec)} if config.transposes else {}),
        **config.peft_values(),
        **opening(spec, config.peft_type),
        **places(spec),
    }
    return json.dumps(made, indent=2, sort_keys=True, allow_nan=False).encode()


LAYERS: Mapping[type[AdapterConfig], PeftKind] = {config: kind_of(config) for config in PEFT_CONFIGS}
"""The rows of the table of PEFT's methods."""
