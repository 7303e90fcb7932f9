"""One plain transformers model out of a base and an adapter that are in memory: folded in, checked, saved.

`graftory.compose.exports` does the same from a base's files, without having the model in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from graftory.adapter import Adapter
from graftory.adapters import AdaptedModel, base_of, is_adapted
from graftory.compose.card import save_export
from graftory.compose.exports.changes import apply, describe, plan
from graftory.compose.exports.check import ExportCheck, compare
from graftory.compose.exports.outline import quantization_of
from graftory.compose.exports.stream import Exported, Source, check_base, export_folder
from graftory.errors import MergeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ExportCheck", "Exported", "Source", "export", "export_folder", "save_export", "verify_export"]


def export(
    model: PreTrainedModel, adapter: Adapter, *, head: Adapter | None = None, dequantize: bool = False
) -> PreTrainedModel:
    """Return a copy of the model that needs no adapter: its weights changed at every site, the task's head put in.

    The model itself stays as it is. The copy is an ordinary transformers model of the same class.

    Args:
        model: The plain base model (detach adapters first).
        adapter: An adapter of that base, of a method that changes weights, or a parallel bottleneck that does what the
            base's FFN does, which then gets wider.
        head: An adapter to take task and head from, where `adapter` is merged and has none.
        dequantize: Turn the weights of a quantised model back into floating-point numbers first.

    Raises:
        MergeError: If the update is not linear in the weights, or a module cannot take it.
        BaseMismatchError: If the adapter belongs to another base.
    """
    if is_adapted(model):
        raise MergeError("got a model with adapters attached, wanted the plain base; call detach() first")
    method = quantization_of(model.config)
    if method is not None and not dequantize:
        raise MergeError(
            f"the base is quantised ({method}), so its weights cannot take an update; pass dequantize=True, load the "
            "unquantised base, or serve the adapter with attach()"
        )
    plain = copy.deepcopy(model)
    if method is not None:
        plain = cast("PreTrainedModel", plain.dequantize() or plain)
        if hasattr(plain.config, "quantization_config"):
            del plain.config.quantization_config
    else:
        for one in (adapter,) if head is None else (adapter, head):
            check_base(one, base_of(model))
    todo = plan(plain, adapter, head)
    apply(plain, todo)
    describe(plain, (head or adapter).spec.task, todo.settings)
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
    chosen = adapted.names[0] if name is None else name
    inputs = list(batches)

    def wanted() -> Iterable[Tensor]:
        for batch in inputs:
            with adapted.route(chosen, heads=head):
                yield cast(Tensor, adapted(**batch).logits)

    modes = adapted.training, exported.training
    adapted.eval()
    exported.eval()  # type: ignore[no-untyped-call, unused-ignore]
    try:
        return compare(exported, inputs, wanted())
    finally:
        adapted.train(modes[0])
        exported.train(modes[1])
