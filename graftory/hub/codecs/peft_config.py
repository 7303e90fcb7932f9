"""PEFT's `adapter_config.json`: what is read from it, what is refused, how ours is written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftory.adapter import AdapterSpec, TaskInfo
from graftory.config import LoraConfig
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from graftory.schema import Json

_CONV1D_ARCHITECTURES = {"gpt2", "openai-gpt"}
"""Architectures whose layers keep their weight as [in, out]."""
_TASK_TYPES = {
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "causal_lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
}
_TRAINED_EMBEDDINGS = {"embed_tokens", "embeddings", "shared", "word_embeddings", "wte"}
_LITERAL = re.compile(r"[A-Za-z0-9_.-]+")
_MAX_PATTERNS = 4096
_MAX_SAVED = 64
_MAX_TEXT = 1024
"""Most entries of a pattern and of `modules_to_save`, which are compared with every module, and letters of a text."""

_INERT = {
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
}
"""Keys that change no number here: notes, training settings, and where to sit, which the tensors say."""


@dataclass(frozen=True, slots=True)
class PeftLora:
    """What graftory reads from `adapter_config.json`."""

    base: str | None
    revision: str | None
    rank: int
    alpha: float
    rslora: bool
    dropout: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]
    task_type: str | None
    peft_version: str | None

    def rank_of(self, path: str) -> int:
        """The rank that PEFT gives a module."""
        key = _matching(self.rank_pattern, path)
        return self.rank if key is None else self.rank_pattern[key]

    def alpha_of(self, path: str) -> float:
        """The alpha that PEFT gives a module."""
        key = _matching(self.alpha_pattern, path)
        return self.alpha if key is None else self.alpha_pattern[key]

    def scale_of(self, path: str) -> float:
        """The factor on B A at a module."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rslora else rank)

    def heads_in(self, keys: Sequence[str]) -> tuple[str, ...]:
        """Paths of the saved modules that have tensors among `keys`: as PEFT wraps them, the outermost
        whose path ends with an entry of `modules_to_save`."""
        found = set()
        for key in keys:
            parts = key.split(".")
            prefixes = (".".join(parts[:n]) for n in range(1, len(parts)))
            head = next((p for p in prefixes if p.endswith(self.modules_to_save)), None)
            if head is not None:
                found.add(head)
        trained = sorted(head for head in found if head.rpartition(".")[2] in _TRAINED_EMBEDDINGS)
        if trained:
            raise UnsupportedAdapterError(
                f"adapter_config.json: modules_to_save: {trained[0]!r} is an embedding; graftory keeps heads only"
            )
        return tuple(sorted(found))


def _matching(patterns: Mapping[str, object], path: str) -> str | None:
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
        raise UnsupportedAdapterError(f"{where}: peft_type is {data.get('peft_type')!r:.80}, graftory reads 'LORA'")
    _refuse_features(data, where)
    read = _Reader(data, where)
    return PeftLora(
        base=read.text("base_model_name_or_path"),
        revision=read.text("revision"),
        rank=read.number("r", 8, _is_rank),
        alpha=float(read.number("lora_alpha", 8, _is_finite)),
        rslora=read.number("use_rslora", False, _is_bool),
        dropout=float(read.number("lora_dropout", 0.0, _is_rate)),
        rank_pattern=read.pattern("rank_pattern", _is_rank),
        alpha_pattern=read.pattern("alpha_pattern", _is_finite),
        modules_to_save=read.texts("modules_to_save"),
        task_type=read.text("task_type"),
        peft_version=read.text("peft_version"),
    )


def _is_rank(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_finite(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rate(value: Json) -> bool:
    return _is_finite(value) and 0 <= value < 1


def _is_bool(value: Json) -> bool:
    return isinstance(value, bool)


def _is_text(value: str) -> bool:
    """Whether a text is a name or a path: on one line, and no address that something might fetch."""
    return len(value) <= _MAX_TEXT and value.isprintable() and "://" not in value


def _is_auto_mapping(value: Json) -> bool:
    return not value or (isinstance(value, dict) and str(value.get("parent_library")).startswith("transformers."))


_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
}
_ACCEPTED: Mapping[str, Callable[[Json], bool]] = {
    "bias": lambda value: value in (None, "none"),
    "init_lora_weights": lambda value: value in (None, True, False, "gaussian", "eva", "orthogonal"),
    "task_type": lambda value: value in (None, "SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"),
    "auto_mapping": _is_auto_mapping,
}
"""Keys that are read only to be refused unless their value is harmless. A `init_lora_weights` that
changes the base (pissa, olora, corda, loftq, lora_ga) is not."""


def _refuse_features(data: dict[str, Json], where: str) -> None:
    """Refuse every other key unless it is off (null, false or empty): a feature of a PEFT that is newer
    than this file counts as unsupported as soon as it is used."""
    for key, value in data.items():
        if key in _READ or key in _INERT:
            continue
        accepted = _ACCEPTED.get(key, lambda value: value in (None, False, [], {}))
        if not accepted(value):
            raise UnsupportedAdapterError(
                f"{where}: {_shown(key)} = {value!r:.80} is something graftory does not do; train without it"
            )


def _shown(key: str) -> str:
    """A key for an error's text, whatever a stranger called it."""
    return key if _LITERAL.fullmatch(key) and len(key) <= 80 else f"{key!r:.80}"


@dataclass(frozen=True, slots=True)
class _Reader:
    data: dict[str, Json]
    where: str

    def text(self, key: str) -> str | None:
        value = self.data.get(key)
        self._require(value is None or (isinstance(value, str) and _is_text(value)), key)
        return value or None

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.data.get(key) or []
        self._require(isinstance(value, list) and all(isinstance(item, str) and item for item in value), key)
        self._limit(value, _MAX_SAVED, key)
        return tuple(dict.fromkeys(value))

    def number(self, key: str, default: Json, valid: Callable[[Json], bool]) -> Any:
        value = self.data.get(key, default)
        self._require(valid(value), key)
        return value

    def pattern(self, key: str, valid: Callable[[Json], bool]) -> dict[str, Json]:
        value = self.data.get(key) or {}
        self._require(isinstance(value, dict) and all(valid(item) for item in value.values()), key)
        self._limit(value, _MAX_PATTERNS, key)
        for pattern in value:
            if not _LITERAL.fullmatch(pattern):
                raise UnsupportedAdapterError(
                    f"{self.where}: {key} has the regular expression {pattern!r:.80}; write plain module paths"
                )
        return dict(value)

    def _limit(self, values: Sequence[Json] | Mapping[str, Json], most: int, key: str) -> None:
        if len(values) > most:
            raise UnsupportedAdapterError(f"{self.where}: {key} has {len(values)} entries, graftory reads {most}")

    def _require(self, condition: bool, key: str) -> None:
        if not condition:
            raise CorruptAdapterError(
                f"{self.where}: {key} = {self.data.get(key)!r:.80} is not possible; correct the file"
            )


def write_config(spec: AdapterSpec) -> bytes:
    """Our `adapter_config.json`: explicit modules, ready for plain `PeftModel.from_pretrained`.

    Raises:
        UnsupportedAdapterError: If the specification is not LoRA.
    """
    lora = spec.config
    if not isinstance(lora, LoraConfig):
        raise UnsupportedAdapterError(f"method {spec.method!r} is not LoRA; PEFT's files cannot hold it")
    ranks = {path: lora.rank_of(path) for path in lora.targets}
    alphas = {path: _whole(lora.alpha_pattern.get(path, lora.alpha)) for path in lora.targets}
    config = {
        "peft_type": "LORA",
        "task_type": _task_type(spec),
        "base_model_name_or_path": spec.base.id,
        "revision": spec.base.revision,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": _whole(lora.alpha),
        "use_rslora": lora.rslora,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "modules_to_save": list(spec.task.head) or None if spec.task else None,
        "rank_pattern": dict(_exceptions(ranks, lora.rank)),
        "alpha_pattern": dict(_exceptions(alphas, _whole(lora.alpha))),
        "bias": "none",
        "fan_in_fan_out": spec.base.architecture in _CONV1D_ARCHITECTURES,
        "init_lora_weights": True,
    }
    return (json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _exceptions(values: Mapping[str, float], default: float) -> list[tuple[str, float]]:
    """The pattern of the modules that differ, longest path first because PEFT takes the first suffix
    that matches; of all modules where that would still catch a wrong one."""
    ordered = sorted(values.items(), key=lambda item: (-len(item[0]), item[0]))
    pattern = {path: value for path, value in ordered if value != default}
    found = {path: _matching(pattern, path) for path in values}
    right = all((default if key is None else pattern[key]) == values[path] for path, key in found.items())
    return list(pattern.items()) if right else ordered


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _task_type(spec: AdapterSpec) -> str | None:
    """PEFT's model class. None is the plain `PeftModel`: for ViT, whose inputs are pixels, and for a
    classifier without a saved head, which PEFT would insist on."""
    task: TaskInfo | None = spec.task
    if task is None or spec.base.architecture == "vit" or (task.outputs and not task.head):
        return None
    return _TASK_TYPES[task.kind]
