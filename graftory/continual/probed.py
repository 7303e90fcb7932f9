"""What the general-ability probe is asked, and what it found. See `probe`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graftory.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSettings:
    """Which texts a language model is to read."""

    text: str
    """A text file (.txt) whose paragraphs are the texts, or a task, `wheel:NAME` or a YAML, of whose test part the
    input texts are read. Relative to the sequence's file. No task of the sequence should be trained on it."""
    rows: int = 64
    """So many texts, drawn by the sequence's seed."""
    max_length: int = 128
    """Tokens that a text is cut to."""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.max_length < 2:
            raise ConfigError(
                f"probe: got rows {self.rows} and max_length {self.max_length}; wanted 1 or more, and 2 or more"
            )


@dataclass(frozen=True, slots=True)
class Probed:
    """The probe after one step."""

    step: int
    """From 1; 0 is the bare base."""
    texts: int
    tokens: int
    loss: float
    """Nats per token: of the base, or the mean over the adapters of the tasks learnt so far."""
    tasks: Mapping[str, float] = field(default_factory=dict)
    """With what answers each task learnt so far."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """sha256 of these adapters: one that stayed is not measured again."""
    routed: float | None = None
    """With the adapter, or the bare base, that the router takes for each text."""
    routes: Mapping[str, int] = field(default_factory=dict)
    """Texts that went to each task, and to `abstained`."""
