"""A task as a small YAML file describes it: what kind, which data, which columns, which metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from graftory.adapter import TaskKind, check_name
from graftory.data.catalogue import PREFIX, sample_task
from graftory.errors import ConfigError, InvalidNameError
from graftory.schema import Json, decode

METRICS_OF_KIND: Mapping[TaskKind, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews", "loss"),
    "regression": ("pearson", "spearman", "mse", "loss"),
    "causal_lm": ("loss", "exact_match", "accuracy", "likelihood"),
    "seq2seq": ("loss", "exact_match", "accuracy", "likelihood"),
}
"""The metrics a kind can be measured by; the first is its default."""
TEXT_KINDS: tuple[TaskKind, ...] = ("causal_lm", "seq2seq")
"""Kinds whose answer is a text that a language model writes."""

_SPLITS = ("train", "validation", "test")
_LABELLED = ("classification", "regression")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """Where rows come from: files, a data set of the hub, or a sample; exactly one of them."""

    sample: str | None = None
    """`wheel:NAME`."""
    dataset: str | None = None
    """Id of a data set on the hub."""
    config: str | None = None
    """Configuration of that data set."""
    revision: str | None = None
    """Commit or tag of that data set."""
    train: str | None = None
    """File (CSV, TSV, JSON, JSONL, parquet), relative to the YAML; with `dataset`: name of its split."""
    validation: str | None = None
    test: str | None = None
    holdout: float | None = None
    """With a training file and no test file: share of its rows kept for the test, chosen by a hash."""

    def __post_init__(self) -> None:
        files = self.dataset is None and any(getattr(self, split) is not None for split in _SPLITS)
        if sum((self.sample is not None, self.dataset is not None, files)) != 1:
            raise ConfigError("data: wanted one of 'sample', 'dataset' or files ('train', 'validation', 'test')")
        if self.holdout is not None and not (files and self.test is None and 0 < self.holdout < 1):
            raise ConfigError("data.holdout: wanted a share between 0 and 1, with 'train' and without 'test'")
        if (self.config or self.revision) and self.dataset is None:
            raise ConfigError("data: 'config' and 'revision' go with 'dataset' only")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFile:
    """One task. Column names refer to the data; `target` is the text a language model is to write, `labels` the words
    that it may be, where it is one of a few."""

    name: str
    kind: TaskKind
    data: DataSource
    text: str = "text"
    pair: str | None = None
    label: str | None = None
    target: str | None = None
    labels: tuple[str, ...] = ()
    metric: str = ""
    max_length: int = 128
    template: str = "{text}"

    def __post_init__(self) -> None:
        _check_columns(self)
        metrics = METRICS_OF_KIND[self.kind]
        if not self.metric:
            object.__setattr__(self, "metric", metrics[0])
        if self.metric not in metrics:
            raise ConfigError(f"metric: got {self.metric!r}, a {self.kind} task takes {', '.join(metrics)}")
        if self.max_length < 2:
            raise ConfigError(f"max_length: got {self.max_length}, wanted 2 or more")
        if len(set(self.labels)) != len(self.labels):
            raise ConfigError(f"labels: got {', '.join(self.labels)}; each may be there once")
        try:
            self.template.format(text="", pair="")
        except (KeyError, IndexError, ValueError):
            raise ConfigError(f"template: {self.template!r} may hold {{text}} and {{pair}} only") from None


def load_task(source: str) -> TaskFile:
    """Read a task from a YAML file, or take a sample task as it is (`wheel:trec`).

    A YAML whose data is a sample may leave out whatever the sample already says.

    Raises:
        ConfigError: If the file cannot be read or does not describe a task.
    """
    if source.startswith(PREFIX):
        return _decode(_sample_defaults(source), source)
    path = Path(source)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no task file {source!r}; give the path of a YAML, or a sample such as wheel:trec") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read the task file {source!r}: {reason:.200}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: got {type(raw).__name__}, wanted keys such as name, kind, data, text, label")
    return _decode(_complete(raw, path), source)


def _decode(raw: Json, source: str) -> TaskFile:
    try:
        task = decode(TaskFile, raw, source)
        check_name(task.name)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(source) else f"{source}: {text}") from None
    except InvalidNameError as error:
        raise ConfigError(f"{source}: name: {error}") from None
    return task


def _complete(raw: dict[str, Json], path: Path) -> Json:
    """Fill in what a sample says, resolve the paths, and read labels such as 0 and 1 as names."""
    data = raw.get("data")
    if isinstance(data, dict):
        sample = data.get("sample")
        if isinstance(sample, str):
            words = raw.get("kind") in TEXT_KINDS and raw.get("target") == "label"
            raw = {**_sample_defaults(sample, raw.get("kind"), words=words), **raw}
        elif "dataset" not in data:
            resolve = {split: data[split] for split in _SPLITS if isinstance(data.get(split), str)}
            raw = {**raw, "data": {**data, **{split: str(path.parent / file) for split, file in resolve.items()}}}
    if isinstance(raw.get("labels"), list):
        raw = {**raw, "labels": [str(label) for label in raw["labels"]]}
    return raw


def _sample_defaults(source: str, kind: Json = None, *, words: bool = False) -> dict[str, Json]:
    """The keys of a sample task; only those of its data if it is used for another kind, and its labels if a language
    model is to write these words."""
    sample = sample_task(source)
    shared = {"name": source.removeprefix(PREFIX), "data": {"sample": source}, "max_length": sample.max_length}
    shared |= {"pair": sample.pair}
    if kind not in (None, sample.kind):
        return {**shared, "labels": list(sample.labels)} if words else shared
    column = {"label": "label"} if sample.kind in _LABELLED else {"target": "target"}
    own = {"kind": sample.kind, "labels": list(sample.labels), "metric": sample.metric, "template": sample.template}
    return {**shared, **own, **column}


def _check_columns(task: TaskFile) -> None:
    wanted, other = ("label", "target") if task.kind in _LABELLED else ("target", "label")
    if getattr(task, wanted) is None:
        raise ConfigError(f"{wanted!r} is missing: a {task.kind} task names the column of its {wanted}s")
    if getattr(task, other) is not None:
        raise ConfigError(f"{other!r} does not go with a {task.kind} task; it takes {wanted!r}")
    if task.labels and task.kind == "regression":
        raise ConfigError("'labels' does not go with a regression task")
    if task.metric == "accuracy" and task.kind in TEXT_KINDS and len(task.labels) < 2:
        raise ConfigError(
            f"metric accuracy: a {task.kind} task is scored word against word; name the words in 'labels', or take "
            "exact_match"
        )
