"""What becomes of each tensor of a base when an adapter is folded in: planned without any numbers, made one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from graftory.adapter import Adapter, TaskInfo
from graftory.adapters.architectures import is_linear, module_at
from graftory.compose.exports.widen import widened
from graftory.compose.folding import FOLDS, Linear, by_rows, outputs_of
from graftory.config import (
    AdapterConfig,
    AptConfig,
    BottleneckConfig,
    CodaConfig,
    HyperformerConfig,
    NormedBottleneckConfig,
    PhaConfig,
    PrefixConfig,
    PromptConfig,
    SmopConfig,
)
from graftory.errors import MergeError, ShapeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 1 << 20
"""Most numbers of a weight that are held in fp64 at a time."""

Read = Callable[[str], Tensor]
"""Reads a tensor of the base, by its name in the model, into memory of its own."""

_OBSTACLES: Mapping[type[AdapterConfig], str] = {
    SmopConfig: "is a prompt in the input",
    PromptConfig: "is a prompt in the input",
    PrefixConfig: "is keys and values in front of the text's",
    AptConfig: "is keys and values in front of the text's",
    HyperformerConfig: "makes adapters (take one task's with hub compose export-task)",
    PhaConfig: "makes adapters (take one task's with hub compose export-task)",
    CodaConfig: "chooses tokens by what it reads",
    NormedBottleneckConfig: "has a non-linearity and a norm",
}
"""Why an adapter cannot be folded in, where it is another reason than most have."""


GRAPHED: tuple[type[AdapterConfig], ...] = (BottleneckConfig, NormedBottleneckConfig)
"""Methods that are no change of weights, and that `exports.graph` can write all the same."""


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one tensor."""

    shape: tuple[int, ...]
    make: Callable[[Read, torch.dtype], Tensor]
    """(reads the base's tensors, the type wanted) -> the new tensor."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of a base."""

    changes: Mapping[str, Change]
    """By the name of the parameter in the model."""
    settings: Mapping[str, int] = field(default_factory=dict)
    """Values of the configuration that change with them."""


def plan(model: PreTrainedModel, adapter: Adapter, head: Adapter | None = None) -> Plan:
    """Plan the folding of an adapter into a model, which may be on the device `meta`; the model stays as it is.

    Args:
        model: The plain base model.
        adapter: An adapter of that base.
        head: An adapter to take task and head from, if not from the first.

    Raises:
        MergeError: If the update is no change of weights, or a module cannot take it.
        BaseMismatchError: If the model lacks a module.
        ShapeError: If an update does not fit a weight.
    """
    config = adapter.spec.config
    source = head or adapter
    heads = dict(head_plan(model, source).changes)
    fold = FOLDS.get(type(config))
    if fold is not None:
        names = _names_by_parameter(model)
        folded: dict[str, Change] = {}
        for path in config.targets:
            folded |= _folding(model, adapter, path, names)
        return Plan({**folded, **heads})
    changes, settings, why = widened(model, adapter)
    if why is None:
        return Plan({name: Change(*change) for name, change in changes.items()} | heads, settings)
    obstacle = _OBSTACLES.get(type(config), "has a non-linearity")
    graph = "export it with its base as one graph (--format pt2), " if type(config) in GRAPHED else ""
    raise MergeError(
        f"a {config.method} adapter {obstacle}, so no weight of the base can hold it{why}; {graph}export a lora "
        "adapter, or serve this one with attach()"
    )


def head_plan(model: PreTrainedModel, source: Adapter) -> Plan:
    """Plan to put an adapter's head in place of a model's, and nothing else. Raises as `plan`."""
    return Plan({} if source.spec.task is None else _head(model, source.spec.task, source.head_tensors()))


def apply(model: PreTrainedModel, todo: Plan) -> None:
    """Carry out a plan on a model in memory; where a parameter gets another shape, its module says so too."""
    with torch.no_grad():
        for name, change in todo.changes.items():
            _put(model, name, change)


def describe(model: PreTrainedModel, task: TaskInfo | None, settings: Mapping[str, int]) -> None:
    """Say in a model's configuration what its head gives out, and what else has changed."""
    config = model.config
    for name, value in settings.items():
        setattr(config, name, value)
    if task is None or task.outputs == 0:
        return
    labels = task.labels or ("LABEL_0",)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.num_labels = task.outputs
    config.problem_type = "regression" if task.kind == "regression" else "single_label_classification"
    if hasattr(model, "num_labels"):
        model.num_labels = task.outputs  # type: ignore[assignment, unused-ignore]


def _head(model: PreTrainedModel, task: TaskInfo, tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    """The task's head in place of the model's, whatever its size."""
    if task.outputs and not tensors:
        raise MergeError(f"the adapter of task {task.name!r} carries no head; give one with head=")
    names = _names_by_parameter(model)
    changes = {}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        found, module = module_at(model, path)
        old = getattr(module, name, None)
        if not isinstance(old, nn.Parameter):
            raise MergeError(
                f"{key} of the head is not a parameter of {type(model).__name__}; load the task's model class"
            )
        _check_own(path, f"{found}.{name}", names[id(old)])
        changes[f"{found}.{name}"] = Change(tuple(tensor.shape), partial(_given, tensor))
    return changes


def _put(model: PreTrainedModel, name: str, change: Change) -> None:
    path, _, part = name.rpartition(".")
    module = model.get_submodule(path)
    old = cast(nn.Parameter, getattr(module, part))
    new = change.make(lambda wanted: model.get_parameter(wanted).detach().cpu().clone(), old.dtype)
    if new.shape == old.shape:
        old.copy_(new)
        return
    setattr(module, part, nn.Parameter(new.to(old.device), old.requires_grad))
    if isinstance(module, nn.Linear) and part == "weight":
        module.out_features, module.in_features = new.shape


def _given(tensor: Tensor, _: Read, dtype: torch.dtype) -> Tensor:
    return tensor.to("cpu", dtype, copy=True)


def _names_by_parameter(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _check_own(path: str, name: str, names: Sequence[str]) -> None:
    """Check that a parameter is one module's alone."""
    shared = [other for other in names if other != name]
    if shared:
        raise MergeError(
            f"{path} shares its {name.rpartition('.')[2]} with {shared[0]}, so folding would change both; train an "
            "adapter without this target, or serve this one with attach()"
        )


def _folding(
    model: PreTrainedModel, adapter: Adapter, path: str, names: Mapping[int, Sequence[str]]
) -> dict[str, Change]:
    found, module = module_at(model, path)
    if not (is_linear(module) or _is_norm(module)):
        raise MergeError(f"{path} is a {type(module).__name__}, wanted Linear or Conv1D; it cannot hold an update")
    weight, bias = cast(nn.Parameter, module.weight), cast(nn.Parameter | None, getattr(module, "bias", None))
    if not weight.is_floating_point():
        raise MergeError(f"{path} holds {weight.dtype}, wanted floating-point weights; load the base unquantised")
    folding = _Folding(
        adapter,
        path,
        found,
        is_linear(module) and not isinstance(module, nn.Linear),
        {part: names[id(own)] for part, own in (("weight", weight), ("bias", bias)) if own is not None},
    )
    changes = {f"{found}.weight": Change(tuple(weight.shape), folding.weight)}
    return changes if bias is None else {**changes, f"{found}.bias": Change(tuple(bias.shape), folding.bias)}


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, of whatever class: it has one gain a channel."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1


class _Folding:
    """The folding of an adapter into one module: in fp64, rounded once, in blocks of outputs where the method can.

    Args:
        adapter: The adapter.
        path: The module as the adapter calls it.
        found: The same as the model calls it.
        transposed: Whether its weight is kept as [inputs, outputs].
        names: All names of its parameters, by part.
    """

    def __init__(
        self, adapter: Adapter, path: str, found: str, transposed: bool, names: Mapping[str, Sequence[str]]
    ) -> None:
        self._adapter, self._path, self._found, self._transposed, self._names = adapter, path, found, transposed, names
        self._fold = FOLDS[type(adapter.spec.config)]
        self._bias: Tensor | None = None

    def weight(self, read: Read, dtype: torch.dtype) -> Tensor:
        """The new weight; the new bias is kept for its turn."""
        old = read(f"{self._found}.weight")
        new = old if old.dtype == dtype else old.to(dtype)
        view, into = (old.T, new.T) if self._transposed else (old, new)
        self._bias = read(f"{self._found}.bias").double() if "bias" in self._names else None
        for rows, adapter in self._blocks(view):
            base = Linear(view[rows].double(), None if self._bias is None else self._bias[rows].clone())
            made = self._fold(adapter, self._path, base)
            if made.weight is not base.weight:
                self._check("weight")
                into[rows] = made.weight
            if made.bias is not None and made.bias is not base.bias and self._bias is not None:
                self._check("bias")
                self._bias[rows] = made.bias
        return new

    def bias(self, read: Read, dtype: torch.dtype) -> Tensor:
        """The new bias, made with the weight if that has not been made yet."""
        if self._bias is None:
            self.weight(read, dtype)
        made, self._bias = self._bias, None
        assert made is not None
        return made.to(dtype)

    def _blocks(self, view: Tensor) -> Iterator[tuple[slice, Adapter]]:
        """Rows, and what of the adapter belongs to them."""
        outputs = view.shape[0]
        wanted = outputs_of(self._adapter, self._path)
        if wanted is not None and wanted != outputs:
            raise ShapeError(f"{self._path}: an update of {wanted} outputs for a weight of {tuple(view.shape)}")
        step = max(1, BLOCK // max(1, view[:1].numel()))
        for start in range(0, outputs, step):
            part = by_rows(self._adapter, self._path, start, start + step)
            if part is None:
                yield slice(0, outputs), self._adapter
                return
            yield slice(start, start + step), part

    def _check(self, part: str) -> None:
        _check_own(self._path, f"{self._found}.{part}", self._names[part])
