"""The base's own weights, for adapters whose update depends on them: DoRA and (IA)³ scale what is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from graftory.adapter import BaseModel
from graftory.errors import BaseMismatchError, MergeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Original:
    """A linear module of the base, as it is.

    Attributes:
        weight: W [d_out, d_in], or the gain [d] of a norm, a view of the model's memory.
        bias: b [d_out]; None if it has none.
    """

    weight: Tensor
    bias: Tensor | None


Originals = Callable[[str], Original]
"""The base's module at a path."""


def originals_of(model: PreTrainedModel, base: BaseModel) -> Originals:
    """Look modules up in a model.

    Args:
        model: The plain base model.
        base: What the adapters say that it is.

    Raises:
        MergeError: If adapters are attached to it.
        BaseMismatchError: If it is another model.
    """
    # here, so that a merge that needs no base does not wait for transformers
    from graftory.adapters import base_of, is_adapted
    from graftory.adapters.architectures import module_at

    if is_adapted(model):
        raise MergeError("got a base with adapters attached, wanted the plain one; call detach() first")
    mine = base_of(model)
    for wanted, got in ((base.config_hash, mine.config_hash), (base.weights_hash, mine.weights_hash)):
        if wanted is not None and wanted != got:
            raise BaseMismatchError(
                f"the adapters were trained on {base.id} ({wanted[:19]}…), this model is {mine.id} "
                f"({str(got)[:19]}…); pass the right base"
            )

    def look_up(path: str) -> Original:
        return _original(module_at(model, path)[1], path)

    return look_up


def no_originals(path: str) -> Original:
    """What stands for the base where none was given.

    Raises:
        MergeError: Always.
    """
    raise MergeError(
        f"{path}: this update scales the base's own weights, so merging needs them; hub merge loads the base, from "
        "Python give merge(..., base=model)"
    )


def _original(module: nn.Module, path: str) -> Original:
    from graftory.adapters.architectures import is_linear

    if not (is_linear(module) or isinstance(module, nn.LayerNorm)):
        raise MergeError(f"{path} is a {type(module).__name__}, wanted Linear or Conv1D; it cannot hold an update")
    weight, bias = cast(Tensor, module.weight), cast(Tensor | None, module.bias)
    if not weight.is_floating_point():
        raise MergeError(f"{path} holds {weight.dtype}, wanted floating-point weights; load the base unquantised")
    whole = weight.detach() if isinstance(module, nn.Linear | nn.LayerNorm) else weight.detach().T
    return Original(whole.cpu(), None if bias is None else bias.detach().cpu())
