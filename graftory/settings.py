"""How adapters are trained. No torch: `hub train` takes its options from the fields below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graftory.config import option
from graftory.errors import ConfigError

HeadStart = Literal["random", "probe"]
"""Where a fresh head starts: at random, or at the best linear one (LP-FT, Kumar et al. 2022, arXiv:2202.10054)."""

Optimizer = Literal["adamw", "adafactor"]
"""Adafactor (Shazeer and Stern 2018) with a given learning rate: no relative step, no scaling by the parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How an adapter is trained. The defaults suit adapters on small encoders."""

    epochs: float = option("passes over the training rows", 3.0)
    learning_rate: float = option("highest learning rate", 2e-3)
    head_learning_rate: float | None = option("highest learning rate of heads; by default that of all else", None)
    head_start: HeadStart = option("where a fresh head starts: at random, or fitted to what the base says", "random")
    batch_size: int = option("rows a batch", 16)
    accumulation: int = option("batches a step", 1)
    max_steps: int | None = option("stop after so many steps, whatever the epochs", None)
    warmup: float = option("share of the steps in which the learning rate rises; then it falls linearly to 0", 0.06)
    weight_decay: float = option("decoupled weight decay", 0.01)
    optimizer: Optimizer = option("what takes the steps", "adamw")
    gradient_clip: float = option("largest norm of the gradient", 1.0)
    gradient_checkpointing: bool = option("save memory by running the forward twice", False)
    bf16: bool = option("mixed precision in bfloat16", False)
    save_steps: int = option("steps between two checkpoints, where they are kept", 100)
    seed: int = option("seed of order, dropout and initial head", 0)

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "batch_size", "accumulation", "save_steps", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted more than 0")
        if self.head_learning_rate is not None and not self.head_learning_rate > 0:
            raise ConfigError(f"head_learning_rate: got {self.head_learning_rate}, wanted more than 0")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps: got {self.max_steps}, wanted 1 or more")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup: got {self.warmup}, wanted a share of 0 or more and less than 1")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay: got {self.weight_decay}, wanted 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionSettings(TrainSettings):
    """How an AdapterFusion is trained: the paper's recipe, with a higher learning rate for small encoders and few rows.

    The paper: AdamW, learning rate 5e-5, at most 10 epochs, batches of 16 to 64, on BERT-base.
    """

    epochs: float = option("passes over the training rows", 5.0)
    learning_rate: float = option("highest learning rate (the paper's, for BERT-base, is 5e-5)", 1e-3)


@dataclass(frozen=True, slots=True, kw_only=True)
class SmopSettings(TrainSettings):
    """How SMoP is trained: the paper's recipe for T5, with a rate of its own for a fresh head.

    The paper: Adafactor, learning rate 0.5, weight decay 1e-5, warm-up 6 %; its T5 answers in words and has no head.
    """

    epochs: float = option("passes over the training rows", 10.0)
    learning_rate: float = option("highest learning rate of the prompts", 0.5)
    router_learning_rate: float = option("highest learning rate of the router (the paper's is 0.5)", 0.5)
    head_learning_rate: float | None = option("highest learning rate of the head, where the task has one", 1e-2)
    weight_decay: float = option("decoupled weight decay", 1e-5)
    optimizer: Optimizer = option("what takes the steps", "adafactor")

    def __post_init__(self) -> None:
        TrainSettings.__post_init__(self)
        if not self.router_learning_rate > 0:
            raise ConfigError(f"router_learning_rate: got {self.router_learning_rate}, wanted more than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperformerSettings(TrainSettings):
    """How a hyperformer is trained on several tasks. The paper: AdamW, one learning rate of 3e-4 (T5), temperature 10.

    A step of the generator moves each weight that it makes by as many steps as an embedding has units, so it gets a
    smaller rate than an adapter of its own would: at 1e-3 small encoders learn nothing. Heads, which T5 does not have,
    and embeddings get larger ones.
    """

    learning_rate: float = option("highest learning rate of the generator", 1e-4)
    embedding_learning_rate: float = option("highest learning rate of the tasks' embeddings", 1e-3)
    head_learning_rate: float = option("highest learning rate of the heads", 5e-3)
    temperature: float = option("T: a batch is of a task with a probability ∝ rows^(1/T); 1 is by size", 10.0)

    def __post_init__(self) -> None:
        TrainSettings.__post_init__(self)
        for name in ("embedding_learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted more than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectSettings:
    """How adapters are selected by examples (AdapterSoup, Chronopoulou et al. 2023, arXiv:2302.07027)."""

    most: int = option("select: at most so many adapters", 5)
    threshold: float = option("select by similarity: least mean cosine", 0.15)
    min_share: float = option("select by clustering: least share of the examples in an adapter's clusters", 0.1)
    per_domain: int = option("select: so many examples of the new domain, and of each adapter's training data", 100)
    components: int = option("select by clustering: principal components kept", 50)

    def __post_init__(self) -> None:
        for name in ("most", "per_domain", "components"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted 1 or more")
        if not 0 <= self.min_share <= 1 or not -1 <= self.threshold <= 1:
            raise ConfigError(
                f"min_share {self.min_share:g}, threshold {self.threshold:g}: wanted 0 to 1, and a cosine from -1 to 1"
            )
