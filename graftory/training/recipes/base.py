"""How an adapter learns whose method is a way to train another one's: what stands in for its weights, and what is
kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from graftory.adapter import Adapter, TaskKind
from graftory.adapters import AdaptedModel
from graftory.config import AdapterConfig
from graftory.errors import ConfigError
from graftory.settings import TrainSettings
from graftory.training.encode import Example
from graftory.training.trainer import Hooks, LossTerm, StepRoute

if TYPE_CHECKING:
    from transformers import TrainerCallback

C = TypeVar("C", bound=AdapterConfig)
StandIns = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""The live weights of the body, by their names in `Adapter.tensors` -> what a training step has in their place."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What a recipe sees: the model with the fresh adapter in it, and how it will be trained.

    Attributes:
        model: The model.
        name: The adapter that learns.
        kind: Kind of its task.
        examples: The training rows, encoded.
        pad_id: What they are padded with.
        settings: How to train.
    """

    model: AdaptedModel
    name: str
    kind: TaskKind
    examples: Sequence[Example]
    pad_id: int
    settings: TrainSettings

    @property
    def config(self) -> AdapterConfig:
        """The configuration of the adapter that learns."""
        return self.model.spec(self.name).config

    def exchange(self, adapter: Adapter) -> None:
        """Put another adapter in the place of the fresh one, before it learns."""
        self.model.remove(self.name)
        self.model.add(self.name, adapter, check_base=False)
        self.model.train_only(self.name)


def as_it_is(adapter: Adapter) -> Adapter:
    """An adapter of which all is kept."""
    return adapter


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is different in a training, and what becomes of the adapter."""

    stand_ins: StandIns | None = None
    terms: tuple[LossTerm, ...] = ()
    undecayed: tuple[str, ...] = ()
    rates: tuple[tuple[str, float], ...] = ()
    """Weights with a highest learning rate of their own, as in `Hooks`."""
    extra: nn.Module | None = None
    """Weights that learn beside the adapter's own."""
    callbacks: tuple[TrainerCallback, ...] = ()
    finish: Callable[[Adapter], Adapter] = as_it_is
    """Makes what is kept of what has learnt."""
    resumes: bool = True
    """Whether a training that was cut off can go on from a checkpoint."""

    def joined(self, hooks: Hooks) -> Hooks:
        """A strategy's hooks with these.

        Raises:
            ConfigError: If both bring weights of their own.
        """
        if self.extra is not None and hooks.extra is not None:
            raise ConfigError(
                "the method and the strategy both train weights beside the adapter; train a lora or a bottleneck"
            )
        return replace(
            hooks,
            loss_terms=(*hooks.loss_terms, *self.terms),
            undecayed=(*hooks.undecayed, *self.undecayed),
            rates=(*hooks.rates, *self.rates),
            extra=self.extra if hooks.extra is None else hooks.extra,
            stand_ins=hooks.stand_ins if self.stand_ins is None else in_place(self.stand_ins),
        )


def in_place(stand_ins: StandIns) -> StepRoute:
    """Tensors in the place of an adapter's weights, as a context of a training step."""

    @contextmanager
    def context(model: AdaptedModel, name: str) -> Iterator[None]:
        with model.made(name, stand_ins(model.weights(name))):
            yield

    return context


def plain(adapter: Adapter, kind: type[C], tensors: Mapping[str, Tensor]) -> Adapter:
    """An adapter of another method, with those fields of its configuration that both have.

    Args:
        adapter: What has learnt.
        kind: The configuration that is kept.
        tensors: All tensors, but the head's.
    """
    shared = {field.name: getattr(adapter.spec.config, field.name) for field in fields(kind)}
    return Adapter(replace(adapter.spec, config=kind(**shared)), {**tensors, **adapter.head_tensors()})
