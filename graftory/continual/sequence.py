"""A sequence of tasks as a small YAML file describes it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from graftory.adapter import check_name
from graftory.config import CONFIGS, AdapterConfig
from graftory.continual.router import RouterSettings
from graftory.continual.strategies.base import Scenario
from graftory.errors import ConfigError
from graftory.schema import decode

WHEEL = "wheel:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many rows are used; None means all. The choice of rows depends on the seed alone."""

    train: int | None = None
    test: int | None = None
    router: int | None = 1000
    """Training rows of each task that the router looks at; a fifth of them sets its bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSequence:
    """Tasks one after another on one base model, and how they are learnt."""

    name: str
    base: str
    """Id on the model hub, folder, or `wheel:NAME`."""
    tasks: tuple[str, ...]
    """Task files (relative to the sequence's file) or `wheel:NAME`, in order."""
    strategy: str = "isolated"
    """A row of `STRATEGIES`, or plugins joined by `+`."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of the strategy; where plugins are joined, a mapping for each by its name."""
    scenario: Scenario = "task"
    store_data: bool = True
    """Whether rows of earlier tasks may be kept, or read again; if not, strategies that do are refused."""
    method: str = "lora"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the method: rank, alpha, placement, targets, ..."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Training settings: epochs, learning_rate, batch_size, ..."""
    limits: Limits = field(default_factory=Limits)
    router: RouterSettings = field(default_factory=RouterSettings)
    seed: int = 0
    eval_batch_size: int = 32

    def __post_init__(self) -> None:
        check_name(self.name)
        if "/" in self.name:
            raise ConfigError(f"name: got {self.name!r}, wanted one without '/'; the steps are named after it")
        if not self.tasks:
            raise ConfigError("tasks: got none, wanted at least one")
        if self.eval_batch_size < 1:
            raise ConfigError(f"eval_batch_size: got {self.eval_batch_size}, wanted 1 or more")
        self.config()

    def config(self) -> AdapterConfig:
        """The typed configuration of the adapters. All share one `init_seed`, so they can be souped.

        Raises:
            ConfigError: If the method is unknown or an option does not fit.
        """
        kind = CONFIGS.get(self.method)
        if kind is None:
            raise ConfigError(f"method: unknown method {self.method!r}; known: {', '.join(CONFIGS)}")
        return decode(kind, {"init_seed": self.seed, **self.options}, "options")

    def seed_of(self, task: str, phase: str) -> int:
        """hash(seed, task, phase): independent of the position, so inserting a task shifts no other."""
        digest = hashlib.sha256(f"{self.seed}/{task}/{phase}".encode()).digest()
        return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


def load_sequence(path: str | Path) -> TaskSequence:
    """Read a sequence from a YAML file; its task files are relative to it.

    Raises:
        ConfigError: If it cannot be read, or a key is unknown, missing or ill-typed.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no sequence file {path}; give the path of a YAML with name, base and tasks") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the sequence file {path}: {' '.join(str(error).split()):.200}") from None
    sequence = decode(TaskSequence, data, str(path))
    return _resolved(sequence, path.parent)


def _resolved(sequence: TaskSequence, folder: Path) -> TaskSequence:
    tasks = tuple(task if task.startswith(WHEEL) else str(folder / task) for task in sequence.tasks)
    local = folder / sequence.base
    base = str(local) if not sequence.base.startswith(WHEEL) and local.is_dir() else sequence.base
    return replace(sequence, tasks=tasks, base=base)
