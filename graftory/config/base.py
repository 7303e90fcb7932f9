"""What the configuration of every adapter method is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from graftory.errors import ConfigError

T = TypeVar("T")


def option(help_text: str, default: T) -> T:
    """A field whose help text becomes the help of the command-line option."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What every method has: where it sits and how it was initialised."""

    method: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    """Names of a method's tensors at one site, behind the module path."""
    whole_numbers: ClassVar[tuple[str, ...]] = ()
    """Those of them that are positions, int32, and do not learn."""
    bits: ClassVar[tuple[str, ...]] = ()
    """Those of the parts that are bytes of bits (uint8), not floats."""
    trained_by: ClassVar[str] = "train"
    """The command that makes it: `train` from rows alone, `compose` on top of other adapters."""
    stored_as: ClassVar[str | None] = None
    """The method whose adapters it trains, where that is another one: it is a way to train, and has no files."""

    targets: tuple[str, ...] = ()
    """Sites. Before creation: group names of the architecture table (empty = the method's default);
    in an adapter: the explicit module paths of the base model."""
    init_seed: int | None = 0
    """Seed of the initial tensors; None if unknown. Adapters may be averaged parameter by parameter
    only if they share it."""


def check_rate(name: str, value: float) -> None:
    """Refuse what is no rate of dropout.

    Raises:
        ConfigError: If it is below 0, or 1 and more.
    """
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"{name}: got {value}, wanted 0 or more and less than 1")


def layer_of(path: str) -> int:
    """The number of the layer that a site is in: the first number in its path."""
    return next(int(part) for part in path.split(".") if part.isdigit())
