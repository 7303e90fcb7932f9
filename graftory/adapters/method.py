"""A method is a row: its configuration, its sites, its fresh weights, its paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftory.adapters.site import Site
from graftory.config import AdapterConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def targets_of(config: AdapterConfig) -> Iterable[tuple[str, AdapterConfig]]:
    """A site at each target, with the whole configuration."""
    return ((path, config) for path in config.targets)


def as_it_is(_: PreTrainedModel, config: AdapterConfig) -> AdapterConfig:
    """A configuration that takes nothing more from the model."""
    return config


@dataclass(frozen=True, slots=True)
class Method:
    """One adapter method. `Any` below stands for the method's own configuration class."""

    name: str
    title: str
    paper: str
    config: type[AdapterConfig]
    linear: bool
    """Whether the update is a change of base weights, so that it merges and exports exactly."""
    site: Callable[[PreTrainedModel, str, int, Any], Site[Any]]
    """Makes the site at a module path, for an owner and a configuration."""
    resolve: Callable[[PreTrainedModel, Any], tuple[str, ...]]
    """The explicit module paths that a configuration means on a model."""
    initial: Callable[[PreTrainedModel, str, Any, torch.Generator], dict[str, Tensor]]
    """Fresh tensors for one path, by part."""
    places: Callable[[Any], Iterable[tuple[str, AdapterConfig]]] = targets_of
    """Where a configuration's tensors are: a site for each path, with the part of the configuration it is for."""
    fill: Callable[[PreTrainedModel, Any], AdapterConfig] = as_it_is
    """A configuration whose targets are explicit, with what else it takes from the model."""
    whole: Callable[[PreTrainedModel, Any, torch.Generator], dict[str, Tensor]] | None = None
    """Fresh tensors of a whole adapter, by their names in it, where `initial` for one path at a time will not do."""
