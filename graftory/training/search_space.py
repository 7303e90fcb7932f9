"""What a search may choose among: the method, where it sits, how large it is, and the learning rate.

The choices of a method follow from the fields of its configuration, so every method that `hub train` knows can be
searched. In the spirit of AutoPEFT (Zhou et al. 2023, arXiv:2301.12132), which searches size and insertion of several
kinds of adapters together, and S4 (Chen et al. 2023, arXiv:2301.01821), which searches design spaces of what goes
where; unlike both, all layers are treated alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, get_args

from graftory.config import CONFIGS, AdapterConfig
from graftory.errors import ConfigError
from graftory.schema import Json, decode, field_types

METHODS = ("lora", "bottleneck", "dora", "ia3", "bitfit")
"""Searched unless others are named."""
RATES = (5e-4, 2e-2)
"""Lowest and highest learning rate, log-uniform between them."""
_SIZES: Mapping[str, tuple[int, ...]] = {"rank": (2, 4, 8, 16, 32), "size": (8, 16, 32, 64, 128), "length": (5, 10, 20)}
"""Fields that say how large an adapter is, and what is tried; a method's first is its size."""
_TARGETS = ("qv", "attention", "ffn", "all")


class Suggests(Protocol):
    """The part of Optuna's trials that a space needs."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number between the two."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What one trial trains."""

    config: AdapterConfig
    options: Mapping[str, Json]
    """What was chosen of it."""
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """Methods with their choices; what is fixed is not searched."""

    methods: tuple[str, ...] = METHODS
    fixed: Mapping[str, Json] = field(default_factory=dict)
    """Options of the one method, by field."""
    targets: tuple[str, ...] = ()
    """Where every adapter sits; empty: searched, where a method can sit at several places."""
    learning_rate: float | None = None
    """None: searched."""
    seed: int = 0

    def __post_init__(self) -> None:
        known = [name for name, kind in CONFIGS.items() if kind.trained_by == "train"]
        strange = [name for name in self.methods if name not in known]
        if strange or not self.methods or len(set(self.methods)) < len(self.methods):
            raise ConfigError(
                f"search: got methods {', '.join(self.methods) or 'none'}; wanted some of {', '.join(known)}, each once"
            )
        if self.fixed and len(self.methods) > 1:
            raise ConfigError(
                f"search: {next(iter(self.fixed))} can be fixed for one method only; name it with --method"
            )

    def choices(self, method: str) -> dict[str, tuple[Json, ...]]:
        """What is tried of a method, by field, its default first where it has one; without what is fixed."""
        kind: type = CONFIGS[method]
        kinds = field_types(kind)
        found: dict[str, tuple[Json, ...]] = {}
        if "placement" in kinds:
            found["placement"] = get_args(kinds["placement"])
        elif "rank" in kinds and not self.targets:
            found["targets"] = _TARGETS
        size = next((name for name in _SIZES if name in kinds), None)
        if size is not None:
            found[size] = _SIZES[size]
        return {name: values for name, values in found.items() if name not in self.fixed}

    def suggest(self, trial: Suggests) -> Candidate:
        """Ask for one candidate.

        Raises:
            ConfigError: If the choices do not fit together.
        """
        method = str(trial.suggest_categorical("method", self.methods))
        options = {
            name: trial.suggest_categorical(f"{method}.{name}", values) for name, values in self.choices(method).items()
        }
        rate = self.learning_rate
        if rate is None:
            rate = trial.suggest_float("learning_rate", *RATES, log=True)
        return self.candidate(method, options, rate)

    def candidate(self, method: str, options: Mapping[str, Json], learning_rate: float) -> Candidate:
        """The candidate with these choices."""
        given = {**self.fixed, **options}
        targets = [given.pop("targets")] if "targets" in given else list(self.targets)
        config = decode(CONFIGS[method], {**given, "targets": targets, "init_seed": self.seed}, method)
        return Candidate(config, dict(options), learning_rate)
