"""What the demo does: tasks, adapters, rows. Sized for a few minutes on two cores."""

from __future__ import annotations

from dataclasses import dataclass, replace

from graftory.config import AdapterConfig, BottleneckConfig, LoraConfig
from graftory.settings import TrainSettings

BASE = "wheel:minilm"
TEST_ROWS = 400
"""Test rows of each task, drawn at random where there are more."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One adapter to train."""

    source: str
    config: AdapterConfig
    rows: int
    """Training rows, drawn at random."""
    settings: TrainSettings

    @property
    def name(self) -> str:
        """The adapter's name: the task's."""
        return self.source.removeprefix("wheel:")


_LORA = TrainSettings(epochs=2, learning_rate=3e-3)
_BOTTLENECK = TrainSettings(epochs=2, learning_rate=5e-3, batch_size=8)

ADAPTERS = (
    Planned("wheel:trec", LoraConfig(rank=8), 2000, _LORA),
    Planned("wheel:rotten-tomatoes", BottleneckConfig(size=16), 800, _BOTTLENECK),
    Planned("wheel:sms", LoraConfig(rank=8), 600, replace(_LORA, batch_size=8)),
    Planned("wheel:disaster", BottleneckConfig(size=16), 800, _BOTTLENECK),
)
MERGED = ("trec", "sms")
"""The two LoRA adapters that are merged."""
EXPORTED = "trec"

SEQUENCE_ROWS = 350
SEQUENCE_TEST_ROWS = 150
SEQUENCE_TRAINING = {"epochs": 3.0, "learning_rate": 3e-3, "batch_size": 8}
STRATEGIES = ("seq", "isolated")
