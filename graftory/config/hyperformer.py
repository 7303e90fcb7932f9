"""A generator of adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from graftory.config.base import option
from graftory.config.bottleneck import Activation, NormedBottleneckConfig
from graftory.config.composed import ComposedConfig, Shape
from graftory.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperPlace:
    """One place whose adapter is generated."""

    path: str
    """The module, by its explicit path."""
    stack: str
    """Which generator makes it: one for each stack of layers, `encoder` or `decoder`."""
    layer: int
    """Number of the layer in its stack, from 0."""
    position: int
    """Number of the place in its layer, from 0."""
    inputs: int
    """Width of what the adapter reads."""
    outputs: int
    """Width of what it adds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperTask:
    """One task of a hyperformer; the fields are those of `TaskInfo`."""

    name: str
    kind: str
    source: str = ""
    """The task file, or sample, that it was trained on."""
    labels: tuple[str, ...] = ()
    max_length: int = 128
    template: str = "{text}"
    head: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the tensors of its head, by their names in the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperformerConfig(ComposedConfig):
    """Hyperformer and Hyperformer++ (Karimi Mahabadi et al. 2021, arXiv:2106.04489): adapters from a generator."""

    method: ClassVar[str] = "hyperformer"

    shared: bool = option("one generator for all layers (Hyperformer++), or one for each place (Hyperformer)", True)
    generates: Literal["bottleneck", "lora"] = option("what is generated", "bottleneck")
    size: int = option("hidden units, or rank, of what is generated", 24)
    activation: Activation = option("non-linearity of a bottleneck", "gelu")
    embedding: int = option("width of the embeddings of tasks, layers and positions", 64)
    hidden: int = option("hidden units of the generator", 128)
    places: tuple[HyperPlace, ...] = ()
    """What is generated where; filled in from the base."""
    tasks: tuple[HyperTask, ...] = ()
    """The tasks, in order; filled in by training."""

    def __post_init__(self) -> None:
        for name in ("size", "embedding", "hidden"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted 1 or more")
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ConfigError(f"tasks: got {', '.join(names)}; each may be there once")
        if sorted(place.path for place in self.places) != sorted(self.targets) and self.places:
            raise ConfigError("places: wanted one for each target")
        if any(min(p.layer, p.position, p.inputs - 1, p.outputs - 1) < 0 for p in self.places):
            raise ConfigError("places: wanted layers and positions from 0, and widths of 1 or more")

    def reading(self, width: int) -> HyperformerConfig:
        """The same for a base of hidden states of a width, where something reads them."""
        del width
        return self

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks of layers, each with a generator of its own."""
        return tuple(sorted({place.stack for place in self.places}))

    def made_at(self, place: HyperPlace) -> Mapping[str, Shape]:
        """Shapes of the tensors that are generated for a place, by their names behind its path."""
        if self.generates == "lora":
            return {"lora_A.weight": (self.size, place.inputs), "lora_B.weight": (place.outputs, self.size)}
        shapes = ((self.size, place.inputs), (self.size,), (place.outputs, self.size), *(((place.outputs,),) * 3))
        return dict(zip(NormedBottleneckConfig.parts, shapes, strict=True))

    def maker(self, place: HyperPlace, part: str) -> str:
        """What the linear layer is called that makes a tensor; places with tensors of one shape share it in ++."""
        if not self.shared:
            return f"{place.stack}.{place.layer}.{place.position}.{part.replace('.', '_')}"
        return f"{place.stack}.{part.replace('.', '_')}_{'x'.join(map(str, self.made_at(place)[part]))}"

    def tensor_shapes(self) -> Mapping[str, Shape]:
        """See `ComposedConfig`."""
        shapes: dict[str, Shape] = {}
        for stack in self.stacks:
            here = [place for place in self.places if place.stack == stack]
            parts = 3 if self.shared else 1
            shapes |= {
                f"{stack}.project_in.weight": (self.hidden, parts * self.embedding),
                f"{stack}.project_in.bias": (self.hidden,),
                f"{stack}.project_out.weight": (self.embedding, self.hidden),
                f"{stack}.project_out.bias": (self.embedding,),
                f"{stack}.norm.weight": (self.embedding,),
                f"{stack}.norm.bias": (self.embedding,),
            }
            if self.shared:
                shapes[f"{stack}.layers"] = (1 + max(place.layer for place in here), self.embedding)
                shapes[f"{stack}.positions"] = (1 + max(place.position for place in here), self.embedding)
            for place in here:
                for part, shape in self.made_at(place).items():
                    count = math.prod(shape)
                    shapes[f"{self.maker(place, part)}.weight"] = (count, self.embedding)
                    shapes[f"{self.maker(place, part)}.bias"] = (count,)
        for number, task in enumerate(self.tasks):
            shapes[f"tasks.{number}.embedding"] = (self.embedding,)
            shapes |= {f"tasks.{number}.head.{name}": tuple(shape) for name, shape in task.head.items()}
        return shapes
