"""A site: one place in the base model that holds the weights of every adapter sitting there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle

from graftory.adapter import Adapter
from graftory.adapters.route import Route, current_route
from graftory.config import AdapterConfig
from graftory.errors import ShapeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

C = TypeVar("C", bound=AdapterConfig)
_OBSERVER: ContextVar[Callable[[str, Tensor], None] | None] = ContextVar("graftory_inputs", default=None)


@contextmanager
def shown(observer: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show an observer the path and inputs of every plain adapter that runs inside the `with`, in this thread."""
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


class Site(nn.Module, ABC, Generic[C]):
    """Weights of all adapters at one module of the base, and the hook that adds their updates.

    The base's modules stay where they are and what they are: a site changes what a module returns, and
    removing the hook gives the base back bit for bit.

    Args:
        model: The base model.
        path: The module the site belongs to.
        owner: Identity of the adapted model, to find its route.
    """

    order: ClassVar[int] = 0
    """Where several sites change what one module returns, those of smaller numbers go first."""

    module: nn.Module
    """The base's module."""

    def __init__(self, model: PreTrainedModel, path: str, owner: int) -> None:
        super().__init__()
        self.path = path
        self.owner = owner
        self.configs: dict[str, C] = {}
        self.weights = nn.ModuleDict()
        self.handles: list[RemovableHandle] = []
        self.made: dict[str, Mapping[str, Tensor]] = {}
        """Tensors, by slot and part, that stand in for weights while something generates them."""
        # not a submodule: the base owns its modules
        object.__setattr__(self, "module", model.get_submodule(path))

    @abstractmethod
    def install(self, model: PreTrainedModel) -> None:
        """Register the hooks, in `handles`."""

    @abstractmethod
    def shapes(self, config: C, path: str) -> Mapping[str, tuple[int, ...]]:
        """What shapes the tensors of an adapter must have here, by part.

        Args:
            config: The adapter's configuration.
            path: The module's path as the adapter spells it.
        """

    def listen(self, hook: Callable[..., Any], module: nn.Module | None = None) -> RemovableHandle:
        """Register a hook on what a module (None: the site's own) returns, among those of other sites by `order`,
        whoever came first."""
        module = self.module if module is None else module
        self.handles.append(module.register_forward_hook(hook))
        hooks: Any = module._forward_hooks  # an OrderedDict, whatever its annotation says
        ranked = sorted(hooks, key=lambda number: getattr(getattr(hooks[number], "__self__", None), "order", 0))
        if ranked != list(hooks):
            for number in ranked:
                hooks.move_to_end(number)
        return self.handles[-1]

    def reserve(self, places: int) -> None:
        """Make room for so many adapters, if that is of use."""

    def put(self, slot: str, config: C, path: str, adapter: Adapter) -> None:
        """Add an adapter's weights.

        Args:
            slot: Where they are kept.
            config: The adapter's configuration.
            path: The module's path as the adapter spells it.
            adapter: The adapter.

        Raises:
            ShapeError: If a tensor is missing or has another shape than the base and the configuration ask for.
        """
        parameters = nn.ParameterDict()
        for part, shape in self.shapes(config, path).items():
            parameters[key_of(part)] = self.fitting(adapter, path, part, shape)
        self.weights[slot] = parameters
        self.configs[slot] = config

    def join(self, slot: str, first: Site[Any]) -> None:
        """Take the weights that all sites of an adapter share from the first of them; most methods share none."""

    def standing_in(self, slot: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What `made` has of tensors, by part, that stand in for an adapter's."""
        del slot
        return tensors

    def fitting(self, adapter: Adapter, path: str, part: str, shape: tuple[int, ...]) -> nn.Parameter:
        """A copy of one tensor of an adapter, where the base is.

        Raises:
            ShapeError: If it is missing or has another shape.
        """
        tensor = adapter.tensors.get(f"{path}.{part}")
        if tensor is None or tuple(tensor.shape) != shape:
            got = "nothing" if tensor is None else str(tuple(tensor.shape))
            raise ShapeError(f"{path}.{part}: got {got}, wanted {shape} for this base and configuration")
        return nn.Parameter(tensor.detach().to(self.device()).clone(), tensor.is_floating_point())

    def parts(self, slot: str) -> Sequence[str]:
        """The names of an adapter's tensors here, behind the path."""
        return self.configs[slot].parts

    def drop(self, slot: str) -> None:
        """Remove an adapter's weights."""
        del self.weights[slot], self.configs[slot]

    def tensors(self, slot: str, path: str) -> dict[str, Tensor]:
        """Copies of an adapter's weights, on the CPU, under its own spelling of the path."""
        return {f"{path}.{part}": self.get(slot, part).detach().cpu().clone() for part in self.parts(slot)}

    def live(self, slot: str, path: str) -> dict[str, Tensor]:
        """An adapter's weights themselves, under its own spelling of the path."""
        return {f"{path}.{part}": self.get(slot, part) for part in self.parts(slot)}

    def learn(self, slot: str, learns: bool) -> None:
        """Let an adapter's weights learn, or freeze them; bits never do."""
        for weight in self.weights[slot].parameters():
            weight.requires_grad_(learns and weight.is_floating_point())

    def get(self, slot: str, part: str) -> Tensor:
        """One weight of one adapter."""
        if slot in self.made:
            return self.made[slot][part]
        parameters = self.weights[slot]
        assert isinstance(parameters, nn.ParameterDict)
        weight: Tensor = parameters[key_of(part)]
        return weight

    def route(self) -> Route | None:
        """The route in force, if it is anything but the bare base."""
        return current_route(self.owner)

    def show(self, x: Tensor) -> None:
        """Let an observer see what the adapters here read."""
        observer = _OBSERVER.get()
        if observer is not None:
            observer(self.path, x)

    def device(self) -> torch.device:
        """Where the base keeps the module's weights."""
        return next(self.module.parameters()).device

    def uninstall(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def overheard() -> bool:
    """Whether somebody is told what modules return before any site is: then that is not to be written to."""
    return bool(_global_forward_hooks)


def key_of(part: str) -> str:
    """The name of a parameter in a `ParameterDict`, which takes no dots."""
    return part.replace(".", "_")
