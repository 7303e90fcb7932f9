"""One plain transformers model out of a base and an adapter: folded in, checked, saved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from graftory.adapter import Adapter, TaskInfo
from graftory.adapters import AdaptedModel, base_of, is_adapted
from graftory.adapters.architectures import is_linear, module_at
from graftory.compose.card import save_export
from graftory.compose.folding import FOLDS, Linear
from graftory.config import (
    AdapterConfig,
    HyperformerConfig,
    NormedBottleneckConfig,
    PrefixConfig,
    PromptConfig,
    SmopConfig,
)
from graftory.errors import BaseMismatchError, MergeError, ShapeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ExportCheck", "export", "save_export", "verify_export"]

_OBSTACLES: Mapping[type[AdapterConfig], str] = {
    SmopConfig: "is a prompt in the input",
    PromptConfig: "is a prompt in the input",
    PrefixConfig: "is keys and values in front of the text's",
    HyperformerConfig: "makes adapters (take one task's with hub compose export-task)",
    NormedBottleneckConfig: "has a non-linearity and a norm",
}
"""Why an adapter cannot be folded in, where it is another reason than most have."""


@dataclass(frozen=True, slots=True)
class ExportCheck:
    """How far the exported model is from base + adapter."""

    max_difference: float
    """Largest absolute difference of two logits."""
    n: int
    """Rows compared."""


def export(model: PreTrainedModel, adapter: Adapter, *, head: Adapter | None = None) -> PreTrainedModel:
    """Return a copy of the model that needs no adapter: its weights changed at every site, the task's head put in.

    The model itself stays as it is. The copy is an ordinary transformers model of the same class.

    Args:
        model: The plain base model (detach adapters first).
        adapter: An adapter of that base, of a method that changes weights: lora, dora, ia3, bitfit.
        head: An adapter to take task and head from, where `adapter` is merged and has none.

    Raises:
        MergeError: If the update is not linear in the weights, or a module cannot take it.
        BaseMismatchError: If the adapter belongs to another base.
    """
    if is_adapted(model):
        raise MergeError("got a model with adapters attached, wanted the plain base; call detach() first")
    _check_bases(model, [adapter] if head is None else [adapter, head])
    config = adapter.spec.config
    fold = FOLDS.get(type(config))
    if fold is None:
        raise MergeError(
            f"a {config.method} adapter {_OBSTACLES.get(type(config), 'has a non-linearity')}, so no weight of the "
            "base can hold it; export a lora adapter, or serve this one with attach()"
        )
    plain = copy.deepcopy(model)
    names = _names_by_parameter(plain)
    for path in config.targets:
        _put(plain, path, partial(fold, adapter, path), names)
    source = head or adapter
    if source.spec.task is not None:
        _put_head(plain, source.spec.task, source.head_tensors())
    return plain


def verify_export(
    adapted: AdaptedModel,
    exported: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    name: str | None = None,
    head: str | None = None,
) -> ExportCheck:
    """Compare the logits of base + adapter and of the exported model on real inputs.

    Args:
        adapted: The base with the adapter attached.
        exported: What `export` returned.
        batches: Inputs as the models take them.
        name: The attached adapter; by default the only one.
        head: The attached adapter whose head is used, if another.

    Raises:
        MergeError: If there is nothing to compare, or several adapters and no name.
        ShapeError: If the logits have different shapes.
    """
    if name is None and len(adapted.names) != 1:
        raise MergeError(
            f"{len(adapted.names)} adapters are attached; name the exported one: {', '.join(adapted.names)}"
        )
    name = adapted.names[0] if name is None else name
    worst, rows = 0.0, 0
    modes = adapted.training, exported.training
    adapted.eval()
    exported.eval()  # type: ignore[no-untyped-call, unused-ignore]
    try:
        with torch.inference_mode():
            for batch in batches:
                with adapted.route(name, heads=head):
                    wanted = cast(Tensor, adapted(**batch).logits)
                got = cast(Tensor, exported(**batch).logits)
                if wanted.shape != got.shape:
                    raise ShapeError(
                        f"base + adapter gives logits {tuple(wanted.shape)}, the exported model {tuple(got.shape)}"
                    )
                worst = max(worst, float((wanted.double() - got.double()).abs().max()))
                rows += wanted.shape[0]
    finally:
        adapted.train(modes[0])
        exported.train(modes[1])
    if rows == 0:
        raise MergeError("no batches to compare the exported model on; give at least one row")
    return ExportCheck(worst, rows)


def _check_bases(model: PreTrainedModel, adapters: Sequence[Adapter]) -> None:
    mine = base_of(model)
    for adapter in adapters:
        base = adapter.spec.base
        for wanted, got in ((base.config_hash, mine.config_hash), (base.weights_hash, mine.weights_hash)):
            if wanted is not None and wanted != got:
                raise BaseMismatchError(
                    f"the adapter was trained on {base.id} ({wanted[:19]}…), this model is {mine.id} "
                    f"({str(got)[:19]}…); pass the right base"
                )


def _names_by_parameter(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _put(model: PreTrainedModel, path: str, fold: Callable[[Linear], Linear], names: Mapping[int, list[str]]) -> None:
    """Change one module's weight and bias, in fp64 and rounded once."""
    found, module = module_at(model, path)
    if not (is_linear(module) or isinstance(module, nn.LayerNorm)):
        raise MergeError(f"{path} is a {type(module).__name__}, wanted Linear or Conv1D; it cannot hold an update")
    weight, bias = cast(nn.Parameter, module.weight), cast(nn.Parameter | None, module.bias)
    if not weight.is_floating_point():
        raise MergeError(f"{path} holds {weight.dtype}, wanted floating-point weights; load the base unquantised")
    transposed = is_linear(module) and not isinstance(module, nn.Linear)
    with torch.no_grad():
        old = Linear((weight.T if transposed else weight).double(), None if bias is None else bias.double())
        new = fold(old)
        if new.weight is not old.weight:
            _check_own(path, f"{found}.weight", names[id(weight)])
            weight.copy_(new.weight.T if transposed else new.weight)
        if bias is not None and new.bias is not None and new.bias is not old.bias:
            _check_own(path, f"{found}.bias", names[id(bias)])
            bias.copy_(new.bias)


def _check_own(path: str, name: str, names: Sequence[str]) -> None:
    """Check that a parameter is one module's alone."""
    shared = [other for other in names if other != name]
    if shared:
        raise MergeError(
            f"{path} shares its {name.rpartition('.')[2]} with {shared[0]}, so folding would change both; train an "
            "adapter without this target, or serve this one with attach()"
        )


def _put_head(model: PreTrainedModel, task: TaskInfo, tensors: Mapping[str, Tensor]) -> None:
    """Put the task's head in place of the model's, whatever its size, and describe it in the configuration."""
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        _, module = module_at(model, path)
        old = getattr(module, name, None)
        if not isinstance(old, nn.Parameter):
            raise MergeError(
                f"{key} of the head is not a parameter of {type(model).__name__}; load the task's model class"
            )
        setattr(module, name, nn.Parameter(tensor.to(old.device, old.dtype, copy=True), old.requires_grad))
        if isinstance(module, nn.Linear) and name == "weight":
            module.out_features, module.in_features = tensor.shape
    if task.outputs == 0:
        return
    if not tensors:
        raise MergeError(f"the adapter of task {task.name!r} carries no head; give one with head=")
    config = model.config
    labels = task.labels or ("LABEL_0",)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.num_labels = task.outputs
    config.problem_type = "regression" if task.kind == "regression" else "single_label_classification"
    if hasattr(model, "num_labels"):
        model.num_labels = task.outputs  # type: ignore[assignment, unused-ignore]
