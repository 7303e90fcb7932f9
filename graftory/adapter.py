"""The data that graftory is about: references, specifications, lineage, adapters. No I/O, no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from graftory.config import AdapterConfig, config_from_json, config_to_json
from graftory.errors import ConfigError, InvalidNameError
from graftory.schema import Json, decode, encode

if TYPE_CHECKING:
    from torch import Tensor

_PART = r"[a-z0-9]+(?:[._-][a-z0-9]+)*"
_NAME = re.compile(rf"(?:{_PART}/)?{_PART}")
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_PART = 64
MAX_VERSION = 999_999_999
"""The largest version that a reference can name."""
_DEVICES = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10))}


def check_name(name: str) -> str:
    """Return `name` if it may name an adapter on every file system.

    Raises:
        InvalidNameError: If it is not `[org/]name` of lower-case letters, digits and inner `.`, `_`,
            `-`, at most 64 characters a part, or if a part is a device name of Windows.
    """
    parts = name.split("/")
    too_long = any(len(part) > _MAX_PART for part in parts)
    device = any(part.split(".")[0] in _DEVICES for part in parts)
    if too_long or device or not _NAME.fullmatch(name):
        raise InvalidNameError(
            f"{name!r:.80} is not an adapter name; wanted [org/]name of lower-case letters, digits and inner '.', "
            f"'_' or '-', at most {_MAX_PART} characters a part, no device name"
        )
    return name


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """Names an adapter: `sst2` (newest), `sst2@3`, `sst2@sha256:...`, `sst2:prod` (alias)."""

    name: str
    version: int | None = None
    digest: str | None = None
    alias: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        if sum(part is not None for part in (self.version, self.digest, self.alias)) > 1:
            raise InvalidNameError(f"reference to {self.name!r}: give a version, a digest or an alias, only one")
        if self.version is not None and self.version < 1:
            raise InvalidNameError(f"reference to {self.name!r}: got version {self.version}, wanted 1 or more")
        if self.version is not None and self.version > MAX_VERSION:
            raise InvalidNameError(
                f"reference to {self.name!r}: the version is above {MAX_VERSION}; give a smaller one"
            )
        if self.digest is not None and not _DIGEST.fullmatch(self.digest):
            raise InvalidNameError(f"reference to {self.name!r}: {self.digest!r:.80} is not sha256:<64 hex digits>")
        if self.alias is not None and not _ALIAS.fullmatch(self.alias):
            raise InvalidNameError(f"reference to {self.name!r}: {self.alias!r:.80} is not an alias such as 'prod'")

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Read a reference as people write it.

        Raises:
            InvalidNameError: If it is none of the four forms.
        """
        name, at, selector = text.partition("@")
        if at and selector.startswith("sha256:"):
            return cls(name, digest=selector)
        if at:
            if not re.fullmatch(r"[1-9][0-9]{0,8}", selector):
                raise InvalidNameError(f"{text!r:.80}: after '@' wanted a version such as 3, or sha256:<digest>")
            return cls(name, version=int(selector))
        name, colon, alias = text.partition(":")
        return cls(name, alias=alias) if colon else cls(name)

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.name}@{self.version}"
        if self.digest is not None:
            return f"{self.name}@{self.digest}"
        return f"{self.name}:{self.alias}" if self.alias is not None else self.name


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The frozen model an adapter belongs to.

    The fingerprints tell two bases apart whatever they are called: `config_hash` over architecture and
    shapes, `weights_hash` over all backbone weights rounded to bfloat16 (so that the same model loaded
    in fp32 and in bf16 agrees), `tokenizer_hash` over what turns text into numbers. None where unknown,
    as in an adapter uploaded by a plain PEFT user.
    """

    id: str
    revision: str | None = None
    architecture: str | None = None
    """`config.model_type` of transformers: bert, gpt2, llama, ..."""
    config_hash: str | None = None
    weights_hash: str | None = None
    tokenizer_hash: str | None = None


TaskKind = Literal["classification", "regression", "causal_lm", "seq2seq"]


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What an adapter was trained to do."""

    name: str
    kind: TaskKind
    labels: tuple[str, ...] = ()
    """Label names in the order of the head's outputs (classification)."""
    head: tuple[str, ...] = ()
    """Module paths whose weights the adapter carries as its own head; empty if none."""
    max_length: int = 128
    """Tokens an input is cut to."""
    template: str = "{text}"
    """How an input becomes a prompt (causal_lm, seq2seq)."""

    @property
    def outputs(self) -> int:
        """Outputs of the head: labels of a classification, 1 for a regression, else 0."""
        return {"classification": len(self.labels), "regression": 1}.get(self.kind, 0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured number."""

    name: str
    value: float
    data: str
    split: str
    n: int


TASK_SOURCE = "task_source"
"""Key in `Lineage.parameters`: the task file, or sample, that an adapter was trained on."""

Relation = Literal["composed", "merged", "continued", "distilled", "generated", "compressed"]


@dataclass(frozen=True, slots=True)
class Parent:
    """An adapter that this one was made from."""

    ref: str
    digest: str
    relation: Relation
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where an adapter comes from: enough to make it again."""

    process: str = "imported"
    """What made it: train, merge, import, continual, ..."""
    parents: tuple[Parent, ...] = ()
    parameters: Mapping[str, Json] = field(default_factory=dict)
    """Parameters of the process: learning rate, epochs, merge method, ..."""
    data_hash: str | None = None
    """sha256 of the training rows."""
    seed: int | None = None
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Versions of graftory, torch, transformers, peft."""


Storage = Literal["full", "8bit", "1bit", "bitdelta"]
"""How tensors are written: as they are, or with loss in fewer bits; see `graftory.hub.codecs.packed`."""


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Everything about an adapter but its tensors."""

    base: BaseModel
    config: AdapterConfig
    task: TaskInfo | None = None
    lineage: Lineage = Lineage()
    metrics: tuple[Metric, ...] = ()
    licence: str | None = None
    storage: Storage = "full"

    @property
    def method(self) -> str:
        """The row of the table of methods."""
        return self.config.method


@dataclass(frozen=True, slots=True)
class Adapter:
    """A specification and its tensors, keyed by module path of the base model.

    LoRA: `<path>.lora_A.weight` [r, d_in], `<path>.lora_B.weight` [d_out, r]. Bottleneck:
    `<site>.adapter_down.weight` [size, d], `.adapter_down.bias`, `<site>.adapter_up.weight` [d, size],
    `.adapter_up.bias`. Head: the parameters' own names, e.g. `classifier.weight`.
    """

    spec: AdapterSpec
    tensors: Mapping[str, Tensor]
    sources: tuple[Adapter, ...] = ()
    """The adapters that a composed one works on, in the order of its `composed` parents; they have records of
    their own."""

    def head_tensors(self) -> dict[str, Tensor]:
        """The tensors of the head alone."""
        return {key: value for key, value in self.tensors.items() if self.is_head(key)}

    def body_tensors(self) -> dict[str, Tensor]:
        """All tensors but the head's."""
        return {key: value for key, value in self.tensors.items() if not self.is_head(key)}

    def is_head(self, key: str) -> bool:
        """Whether a tensor belongs to the head."""
        heads = self.spec.task.head if self.spec.task else ()
        return any(key.startswith(f"{head}.") for head in heads)


def spec_to_json(spec: AdapterSpec) -> Json:
    """The specification as plain JSON values. `storage` is told where it is not `full`: a specification without it has
    the bytes it always had."""
    return {
        **({} if spec.storage == "full" else {"storage": spec.storage}),
        "base": encode(spec.base),
        "config": config_to_json(spec.config),
        "task": encode(spec.task),
        "lineage": encode(spec.lineage),
        "metrics": encode(spec.metrics),
        "licence": spec.licence,
    }


def spec_from_json(data: Json, where: str) -> AdapterSpec:
    """The inverse of `spec_to_json`.

    Args:
        data: Plain JSON values.
        where: The file they came from, for the error text.

    Raises:
        ConfigError: If a key is unknown or missing, or a value does not fit.
    """
    keys = {"base", "config", "task", "lineage", "metrics", "licence"}
    if not isinstance(data, dict) or set(data) - {"storage"} != keys:
        got = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ConfigError(f"{where}: got {got}, wanted the keys {sorted(keys)}")
    return AdapterSpec(
        base=decode(BaseModel, data["base"], f"{where}.base"),
        config=config_from_json(data["config"], f"{where}.config"),
        task=None if data["task"] is None else decode(TaskInfo, data["task"], f"{where}.task"),
        lineage=decode(Lineage, data["lineage"], f"{where}.lineage"),
        metrics=decode(tuple[Metric, ...], data["metrics"], f"{where}.metrics"),
        licence=_text_or_none(data["licence"], f"{where}.licence"),
        storage=_storage(data.get("storage", "full"), f"{where}.storage"),
    )


def _storage(data: Json, where: str) -> Storage:
    found: Storage = decode(Storage, data, where)  # type: ignore[arg-type]  # an annotation, which `decode` takes
    return found


def _text_or_none(data: Json, where: str) -> str | None:
    if data is not None and not isinstance(data, str):
        raise ConfigError(f"{where}: got {type(data).__name__} {data!r:.60}, wanted text or null")
    return data
