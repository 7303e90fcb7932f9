"""What `hub compose` trains: fusions and prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from graftory.config.base import AdapterConfig, check_rate, option
from graftory.errors import ConfigError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposedConfig(AdapterConfig):
    """A module that `hub compose` trains. It knows the shapes of all its tensors but the head's."""

    parts: ClassVar[tuple[str, ...]] = ()
    trained_by: ClassVar[str] = "compose"

    def tensor_shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor but the head's, by its name in `Adapter.tensors`."""
        raise NotImplementedError


Track = Literal["lora", "serial", "parallel"]
"""Where an update joins the base: on a linear layer, on the residual stream, beside the FFN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionPlace:
    """One place where sources are fused."""

    path: str
    """The module, by its explicit path."""
    track: Track
    """How the sources sit there: `lora`, `serial` (houlsby, pfeiffer) or `parallel`."""
    inputs: int
    """Width of what the sources and the query read."""
    outputs: int
    """Width of what the sources add."""
    sources: tuple[int, ...]
    """Which sources sit here, by their position among the composed parents, ascending."""

    def shapes(self) -> Mapping[str, Shape]:
        """Shapes of the tensors at this place, by their names behind the path."""
        wide, square = (self.outputs, self.inputs), (self.outputs, self.outputs)
        shapes = {"query.weight": wide, "query.bias": (self.outputs,), "key.weight": square, "value.weight": square}
        return {f"fusion_{self.track}_{part}": shape for part, shape in shapes.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionConfig(ComposedConfig):
    """AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247): attention over the outputs of several adapters."""

    method: ClassVar[str] = "fusion"

    dropout: float = option("dropout on the attention's logits while training", 0.0)
    regularisation: float = option("factor on the sum of |V - I|^2 that is added to the loss", 0.01)
    places: tuple[FusionPlace, ...] = ()
    """Where what is fused; filled in from the sources."""
    sources: int = 0
    """How many adapters it works on: its parents of relation `composed`, in order."""

    def __post_init__(self) -> None:
        check_rate("dropout", self.dropout)
        if not (math.isfinite(self.regularisation) and self.regularisation >= 0):
            raise ConfigError(f"regularisation: got {self.regularisation}, wanted a finite number of 0 or more")
        for place in self.places:
            self._check_place(place)
        names = [(place.path, place.track) for place in self.places]
        if len(set(names)) != len(names):
            raise ConfigError("places: the same path and track twice; wanted each once")

    def _check_place(self, place: FusionPlace) -> None:
        ordered = list(place.sources) == sorted(set(place.sources))
        if not place.sources or not ordered or place.sources[0] < 0 or place.sources[-1] >= self.sources:
            raise ConfigError(
                f"places: {place.path} has the sources {list(place.sources)}, wanted one or more of 0 to "
                f"{self.sources - 1}, ascending"
            )
        if place.path not in self.targets or min(place.inputs, place.outputs) < 1:
            raise ConfigError(f"places: {place.path} is no target, or is {place.inputs} x {place.outputs} wide")

    def at(self, path: str) -> tuple[FusionPlace, ...]:
        """The places at one module."""
        return tuple(place for place in self.places if place.path == path)

    def tensor_shapes(self) -> Mapping[str, Shape]:
        """See `ComposedConfig`."""
        return {f"{place.path}.{part}": shape for place in self.places for part, shape in place.shapes().items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class SmopConfig(ComposedConfig):
    """SMoP (Choi et al., EMNLP 2023): k short prompts at the input, of which a router picks one for each row.

    With one prompt it is plain prompt tuning (Lester et al. 2021, arXiv:2104.08691), the baseline of the paper: there
    is nothing to route, so it has no router.
    """

    method: ClassVar[str] = "smop"

    prompts: int = option("k, the prompts that rows are routed to; 1 is plain prompt tuning", 4)
    length: int = option("l, the soft tokens of each prompt", 5)
    noise: float = option("standard deviation of the factor on the router's logits while training", 1.0)
    spread: float = option("standard deviation of fresh prompts", 1.0)
    width: int = 0
    """d, the width of the input embeddings; filled in from the base."""

    def __post_init__(self) -> None:
        for name in ("prompts", "length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted 1 or more")
        for name in ("noise", "spread"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}: got {value}, wanted a finite number of 0 or more")
        if self.width < 0 or (self.width and len(self.targets) != 1):
            raise ConfigError(f"targets: got {len(self.targets)}, wanted the input embeddings alone")

    def shapes(self) -> Mapping[str, Shape]:
        """Shapes of the tensors, by their names behind the path of the input embeddings."""
        shapes: dict[str, Shape] = {"smop_prompts": (self.prompts, self.length, self.width)}
        return shapes if self.prompts == 1 else {**shapes, "smop_router.weight": (self.prompts, self.width)}

    def tensor_shapes(self) -> Mapping[str, Shape]:
        """See `ComposedConfig`."""
        return {f"{path}.{part}": shape for path in self.targets for part, shape in self.shapes().items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig(ComposedConfig):
    """Prompt tuning (Lester et al. 2021, arXiv:2104.08691): one prompt at the input, the same for every row."""

    method: ClassVar[str] = "prompt"
    trained_by: ClassVar[str] = "train"

    length: int = option("soft tokens of the prompt", 20)
    start: Literal["vocabulary", "normal"] = option("a fresh prompt: tokens of the vocabulary, or noise", "vocabulary")
    spread: float = option("standard deviation of a fresh prompt of noise", 1.0)
    width: int = 0
    """d, the width of the input embeddings; filled in from the base."""

    def __post_init__(self) -> None:
        # what SMoP with one prompt checks
        SmopConfig(prompts=1, length=self.length, spread=self.spread, width=self.width, targets=self.targets)

    @property
    def prompts(self) -> int:
        """One: nothing is routed."""
        return 1

    @property
    def noise(self) -> float:
        """None, as there is no router."""
        return 0.0

    def shapes(self) -> Mapping[str, Shape]:
        """Shapes of the tensors, by their names behind the path of the input embeddings; as of SMoP's one prompt."""
        return {"smop_prompts": (1, self.length, self.width)}

    def tensor_shapes(self) -> Mapping[str, Shape]:
        """See `ComposedConfig`."""
        return {f"{path}.{part}": shape for path in self.targets for part, shape in self.shapes().items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class PTuningConfig(PromptConfig):
    """P-tuning (Liu et al. 2021, arXiv:2103.10385): a prompt that an encoder makes while it learns."""

    method: ClassVar[str] = "p_tuning"
    stored_as: ClassVar[str] = "prompt"

    start: Literal["vocabulary", "normal"] = option("what the encoder reads at first: tokens, or noise", "normal")
    encoder: Literal["mlp", "lstm"] = option("mlp: three layers; lstm: both ways, with two layers behind it", "mlp")
    hidden: int = option("width of the encoder's hidden layers; 0: of the base's embeddings", 0)

    def __post_init__(self) -> None:
        PromptConfig.__post_init__(self)
        if self.hidden < 0:
            raise ConfigError(f"hidden: got {self.hidden}, wanted 0 or more")
