"""Per-task heads: each row of a batch goes through the head of its own adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from graftory.adapters.architectures import head_paths
from graftory.adapters.bank import Bank
from graftory.adapters.route import current_route
from graftory.errors import RouteError, ShapeError
from graftory.kernels import batched_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST_OUTPUTS = 1024


class HeadSite(nn.Module):
    """All heads that adapters bring for one head module of the base.

    A head is a copy of the base's module with the adapter's own weights, so heads of any make and size
    work. In a mixed batch the base's head runs on the whole batch (rows without a head keep its exact bits),
    each adapter's head on its rows, and narrower logits are padded with minus infinity on the right. Heads of one
    linear layer lie in a bank and answer in one call.
    """

    template: nn.Module
    """The base's own head, as it was before any hook."""

    def __init__(self, model: PreTrainedModel, path: str, owner: int) -> None:
        super().__init__()
        self.path = path
        self.owner = owner
        self.weights = nn.ModuleDict()
        module = model.get_submodule(path)
        object.__setattr__(self, "template", copy.deepcopy(module))
        self.handles: list[RemovableHandle] = [module.register_forward_hook(self._hook)]
        parts = tuple(name for name, _ in module.named_parameters())
        self.bank = Bank(parts) if type(module) is nn.Linear else None

    def reserve(self, places: int) -> None:
        """Make room for so many heads."""
        if self.bank is not None:
            self.bank.reserve(places)

    def put(self, slot: str, tensors: Mapping[str, Tensor]) -> None:
        """Add an adapter's head, given by the names its parameters have in the model.

        Raises:
            ShapeError: If a parameter is missing or differs from the base's in more than the number of outputs.
        """
        module = copy.deepcopy(self.template)
        device = next(module.parameters()).device
        own = {}
        for name, old in module.named_parameters():
            tensor = tensors.get(f"{self.path}.{name}")
            if tensor is None or tensor.shape[1:] != old.shape[1:]:
                got = "nothing" if tensor is None else str(tuple(tensor.shape))
                raise ShapeError(f"head {self.path}.{name}: got {got}, wanted (outputs, {tuple(old.shape[1:])})")
            own[name] = nn.Parameter(tensor.detach().to(device).clone())
        if self.bank is not None and self._fits_bank(own):
            own = self.bank.put(slot, own, 1.0)
        for name, parameter in own.items():
            replace_parameter(module, name, parameter)
        self.weights[slot] = module

    def drop(self, slot: str) -> None:
        """Remove an adapter's head."""
        del self.weights[slot]
        if self.bank is not None and slot in self.bank.layout:
            self.bank.drop(slot)

    def replace(self, slot: str, tensors: Mapping[str, Tensor]) -> None:
        """Put another head in the place of an adapter's; it learns if that one did.

        Raises:
            ShapeError: If a parameter is missing or differs from the base's in more than the number of outputs; the
                old head stays.
        """
        before = self.weights[slot]
        learns = any(parameter.requires_grad for parameter in before.parameters())
        kept = self.tensors(slot)
        self.drop(slot)
        try:
            self.put(slot, tensors)
        except ShapeError:
            self.put(slot, kept)
            raise
        finally:
            self.learn(slot, learns)

    def learn(self, slot: str, learns: bool) -> None:
        """Let an adapter's head learn, or freeze it."""
        self.weights[slot].requires_grad_(learns)

    def tensors(self, slot: str) -> dict[str, Tensor]:
        """Copies of an adapter's head, on the CPU."""
        named = self.weights[slot].named_parameters()
        return {f"{self.path}.{name}": weight.detach().cpu().clone() for name, weight in named}

    def again(self, slot: str) -> Tensor:
        """An adapter's logits for what the last forward under the route in force has brought here."""
        route = current_route(self.owner)
        if route is None or self.path not in route.taps:
            raise RouteError("nothing was run under the route in force; call the model first, inside of `route`")
        return self._logits(slot, route.taps[self.path])

    def uninstall(self) -> None:
        """Remove the hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _hook(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        route = current_route(self.owner)
        if route is None:
            return None
        route.taps[self.path] = args[0]
        rows = [slot if slot and slot in self.weights else None for slot in route.head_rows(args[0])]
        used = {slot: [i for i, row in enumerate(rows) if row == slot] for slot in rows if slot is not None}
        if not used:
            return None
        if len(used) == 1 and None not in rows:
            return self._logits(next(iter(used)), args[0]).to(output.dtype)
        pieces = list(self._pieces(rows, used, args[0]))
        width = max(output.shape[-1], *(piece.shape[-1] for _, piece in pieces))
        result = _padded(output, width)
        for numbers, piece in pieces:
            where = torch.tensor(numbers, device=result.device)
            result = result.index_copy(0, where, _padded(piece.to(output.dtype), width))
        return result

    def _pieces(
        self, rows: Sequence[str | None], used: Mapping[str, list[int]], x: Tensor
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Logits with the rows that they are of: all of the bank's at once, those of other heads one by one."""
        banked = [slot for slot in used if self.bank is not None and slot in self.bank.layout]
        if self.bank is not None and len(banked) > 1:
            numbers = [number for number, row in enumerate(rows) if row in banked]
            yield numbers, self._together(self.bank, banked, [rows[number] or "" for number in numbers], x[numbers])
        else:
            banked = []
        for slot, numbers in used.items():
            if slot not in banked:
                yield numbers, self._logits(slot, x[numbers])

    def _together(self, bank: Bank, slots: list[str], rows: list[str], x: Tensor) -> Tensor:
        """The logits of rows whose heads are in the bank."""
        weight, *bias = (bank.joined(part, slots) for part in bank.parts)
        places = torch.tensor([bank.place_of(slot) for slot in slots], device=x.device)
        index = torch.tensor([slots.index(row) for row in rows], device=x.device)
        sizes = bank.sizes()[places].long()
        return batched_head(x.to(weight.dtype), weight, bias[0] if bias else None, index, sizes)

    def _fits_bank(self, own: Mapping[str, Tensor]) -> bool:
        assert self.bank is not None
        dtypes = tuple(tensor.dtype for tensor in own.values())
        # each row's own weights are gathered: for thousands of outputs that would be more than it spares
        small = len(next(iter(own.values()))) <= _MOST_OUTPUTS
        return small and len(set(dtypes)) == 1 and self.bank.dtypes in ((), dtypes)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> HeadSite:
        """Follow the parameters to another device or dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bank is not None:
            self.bank.repair()
        return self

    def _logits(self, slot: str, x: Tensor) -> Tensor:
        """One head's outputs, in the precision it was stored in whatever the base's is."""
        head = self.weights[slot]
        logits: Tensor = head(x.to(next(head.parameters()).dtype))
        return logits


def _padded(logits: Tensor, width: int) -> Tensor:
    missing = width - logits.shape[-1]
    return functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits


def replace_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put another one in place of a parameter, by dotted name; a linear layer learns its new number of outputs."""
    path, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(path)
    setattr(owner, leaf, parameter)
    if isinstance(owner, nn.Linear) and leaf == "weight":
        owner.out_features = parameter.shape[0]


def initial_head(model: PreTrainedModel, outputs: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A fresh head: weights normal with the model's own spread, biases zero.

    Args:
        model: The base, with heads of its own to take the shapes from.
        outputs: Logits of the last layer.
        generator: Source of randomness.
    """
    paths = head_paths(model)
    spread = float(getattr(model.config, "initializer_range", None) or 0.02)
    last = last_linear(model) if paths else ""
    fresh: dict[str, Tensor] = {}
    for path in paths:
        for name, old in model.get_submodule(path).named_parameters():
            key = f"{path}.{name}"
            size = (outputs, *old.shape[1:]) if key.rpartition(".")[0] == last else tuple(old.shape)
            empty = torch.zeros(size)
            fresh[key] = empty.normal_(0.0, spread, generator=generator) if empty.dim() > 1 else empty
    return fresh


def last_linear(model: PreTrainedModel) -> str:
    """The path of the layer that makes a model's logits, in or at its last head."""
    path = head_paths(model)[-1]
    names = [name for name, module in model.get_submodule(path).named_modules() if isinstance(module, nn.Linear)]
    return f"{path}.{names[-1]}".rstrip(".")
