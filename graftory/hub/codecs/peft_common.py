"""What the configurations of PEFT's methods have in common: what is read, what is refused, what is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from graftory.adapter import AdapterSpec, TaskInfo
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

_READ = {"peft_type", "modules_to_save"}
_INERT = {
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "peft_version",
    "revision",
    "runtime_config",
    "target_modules",
}
"""Keys that change no number here: notes, training settings, and where to sit, which the tensors say."""


@dataclass(frozen=True, slots=True)
class PeftFile:
    """What graftory reads from every `adapter_config.json`."""

    base: str | None
    revision: str | None
    modules_to_save: tuple[str, ...]
    task_type: str | None
    peft_version: str | None

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


def common_values(read: Reader) -> dict[str, Any]:
    """The fields of `PeftFile`."""
    return {
        "base": read.text("base_model_name_or_path"),
        "revision": read.text("revision"),
        "modules_to_save": read.texts("modules_to_save"),
        "task_type": read.text("task_type"),
        "peft_version": read.text("peft_version"),
    }


def is_finite(value: Json) -> bool:
    """Whether a value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_bool(value: Json) -> bool:
    """Whether a value is true or false."""
    return isinstance(value, bool)


def _is_text(value: str) -> bool:
    """Whether a text is a name or a path: on one line, and no address that something might fetch."""
    return len(value) <= _MAX_TEXT and value.isprintable() and "://" not in value


def _is_auto_mapping(value: Json) -> bool:
    return not value or (isinstance(value, dict) and str(value.get("parent_library")).startswith("transformers."))


Accepted = Mapping[str, Callable[[Json], bool]]
_ACCEPTED: Accepted = {
    "task_type": lambda value: value in (None, "SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"),
    "auto_mapping": _is_auto_mapping,
}
"""Keys that are read only to be refused unless their value is harmless."""


def refuse_features(data: dict[str, Json], where: str, *, known: Set[str], accepted: Accepted) -> None:
    """Refuse every key that is not known unless it is off (null, false or empty) or has an accepted value: a feature
    of a PEFT that is newer than this file counts as unsupported as soon as it is used.

    Raises:
        UnsupportedAdapterError: If one is in use; the key is named.
    """
    allowed = {**_ACCEPTED, **accepted}
    for key, value in data.items():
        if key in _READ or key in _INERT or key in known:
            continue
        fits = allowed.get(key, lambda value: value in (None, False, [], {}))
        if not fits(value):
            raise UnsupportedAdapterError(
                f"{where}: {_shown(key)} = {value!r:.80} is something graftory does not do; train without it"
            )


def _shown(key: str) -> str:
    """A key for an error's text, whatever a stranger called it."""
    return key if _LITERAL.fullmatch(key) and len(key) <= 80 else f"{key!r:.80}"


@dataclass(frozen=True, slots=True)
class Reader:
    """Values of `adapter_config.json`, checked."""

    data: dict[str, Json]
    where: str

    def text(self, key: str) -> str | None:
        """A short text, or None."""
        value = self.data.get(key)
        self._require(value is None or (isinstance(value, str) and _is_text(value)), key)
        return value or None

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts, each once."""
        value = self.data.get(key) or []
        self._require(isinstance(value, list) and all(isinstance(item, str) and item for item in value), key)
        self._limit(value, _MAX_SAVED, key)
        return tuple(dict.fromkeys(value))

    def number(self, key: str, default: Json, valid: Callable[[Json], bool]) -> Any:
        """A value of its own kind."""
        value = self.data.get(key, default)
        self._require(valid(value), key)
        return value

    def pattern(self, key: str, valid: Callable[[Json], bool]) -> dict[str, Json]:
        """Values by plain paths or ends of paths."""
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


def opening(spec: AdapterSpec, peft_type: str) -> dict[str, Json]:
    """What we write first, whatever the method."""
    return {
        "peft_type": peft_type,
        "task_type": _task_type(spec),
        "base_model_name_or_path": spec.base.id,
        "revision": spec.base.revision,
        "inference_mode": True,
    }


def places(spec: AdapterSpec) -> dict[str, Json]:
    """Where the adapter sits, as explicit modules, and its head."""
    return {
        "target_modules": list(spec.config.targets),
        "modules_to_save": list(spec.task.head) or None if spec.task else None,
    }


def keeps_transposed(spec: AdapterSpec) -> bool:
    """Whether the base's layers keep their weight as [in, out]."""
    return spec.base.architecture in _CONV1D_ARCHITECTURES


def as_file(config: dict[str, Json]) -> bytes:
    """The bytes of `adapter_config.json`."""
    return (json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _task_type(spec: AdapterSpec) -> str | None:
    """PEFT's model class. None is the plain `PeftModel`: for ViT, whose inputs are pixels, and for a
    classifier without a saved head, which PEFT would insist on."""
    task: TaskInfo | None = spec.task
    if task is None or spec.base.architecture == "vit" or (task.outputs and not task.head):
        return None
    return _TASK_TYPES[task.kind]
