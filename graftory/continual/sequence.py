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
from graftory.continual.probed import ProbeSettings
from graftory.continual.router import RouterSettings
from graftory.continual.strategies.base import Scenario
from graftory.errors import ConfigError
from graftory.schema import Json, decode

WHEEL = "wheel:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many rows are used; None means all. The choice of rows depends on the seed alone."""

    train: int | None = None
    test: int | None = None
    router: int | None = None
    """Training rows of each task that the router looks at; a fifth of them (500 at most) sets its bound."""


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
    eval_mixed: bool | None = None
    """Whether the tasks learnt so far are measured together, in batches that mix their rows and adapters. None: where
    they are answered in text. Apart, an adapter that stayed gives the same bits whatever else is in the run."""
    probe: ProbeSettings | None = None
    """General text that a causal language model reads before the first task and after each."""
    report_to: tuple[str, ...] = ()
    """Where losses go beside the progress bar: tensorboard, wandb, ... as transformers' `Trainer` calls them."""
    max_drop: float | None = None
    """δ of the gate: a step after which the score of an old task is lower by more than this, in shares of 1, than after
    the last accepted step is rejected. None: every step is accepted."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if "/" in self.name:
            raise ConfigError(f"name: got {self.name!r}, wanted one without '/'; the steps are named after it")
        if not self.tasks:
            raise ConfigError("tasks: got none, wanted at least one")
        if self.eval_batch_size < 1:
            raise ConfigError(f"eval_batch_size: got {self.eval_batch_size}, wanted 1 or more")
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise ConfigError(f"max_drop: got {self.max_drop}, wanted a share from 0 to 1 (0.02 is 2 points)")
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
    data = read_sequence(path)
    several = [key for key in ("orders", "seeds") if key in data]
    if several:
        raise ConfigError(f"{path}: {several[0]} are several runs; load_study reads those")
    return resolved(decode(TaskSequence, data, str(path)), Path(path).parent)


def read_sequence(path: str | Path) -> Mapping[str, Json]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: If it cannot be read, or is none.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no sequence file {path}; give the path of a YAML with name, base and tasks") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the sequence file {path}: {' '.join(str(error).split()):.200}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got {type(data).__name__}, wanted a mapping with name, base and tasks")
    return data


def resolved(sequence: TaskSequence, folder: Path) -> TaskSequence:
    """The same with files below a folder."""

    def below(source: str) -> str:
        return source if source.startswith(WHEEL) else str(folder / source)

    tasks = tuple(map(below, sequence.tasks))
    local = folder / sequence.base
    base = str(local) if not sequence.base.startswith(WHEEL) and local.is_dir() else sequence.base
    probe = None if sequence.probe is None else replace(sequence.probe, text=below(sequence.probe.text))
    return replace(sequence, tasks=tasks, base=base, probe=probe)
