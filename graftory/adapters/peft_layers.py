"""PEFT's layers with our mixed batch: classes that `mixed_batches` puts before those of a model's own layers."""

from __future__ import annotations

from collections.abc import Sequence
from types import new_class
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from graftory.adapters.banked_site import dropout_of
from graftory.adapters.peft_call import BASE, MixedCall, Owner, call_of
from graftory.adapters.route import Selection
from graftory.errors import RouteError
from graftory.kernels import batched_lora, inlet
from graftory.kernels.shapes import stack_padded


class Mixed(nn.Module):
    """A layer that takes the adapters of its rows from the call in force: PEFT's hooks, without anything to remove."""

    peft_class: type[nn.Module]
    mixed_owner: Owner
    mixed_path: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's own forward, with `adapter_names` for the rows at hand."""
        call = call_of(self.mixed_owner)
        if call is not None:
            kwargs |= self._named(call)
            kwargs["adapter_names"] = call.names_for(args[0]) if args else list(call.names)
        return super().forward(*args, **kwargs)

    def _named(self, call: MixedCall) -> dict[str, Any]:  # noqa: ARG002 (for those below)
        """Further arguments of PEFT's forward."""
        return {}

    def _check_forward_args(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's own checks; what they refuse is said of this layer.

        Raises:
            RouteError: As PEFT raises a `ValueError`: merged adapters, other rows than names, a layer that cannot.
        """
        theirs: Any = super()
        try:
            theirs._check_forward_args(*args, **kwargs)
        except ValueError as error:
            raise RouteError(f"{self.mixed_path}: {error}") from None


class MixedLora(Mixed):
    """A LoRA layer that computes a mixed batch as PEFT does, but also while training."""

    def _named(self, call: MixedCall) -> dict[str, Any]:
        return {} if call.offsets is None else {"alora_offsets": call.offsets}


class BatchedLinear(MixedLora):
    """`peft.tuners.lora.layer.Linear`, the update of all rows in one batched operation."""

    base_layer: nn.Module
    lora_A: nn.ModuleDict  # noqa: N815 (PEFT's name)
    lora_B: nn.ModuleDict  # noqa: N815 (PEFT's name)
    lora_dropout: nn.ModuleDict
    lora_variant: dict[str, Any]
    scaling: dict[str, float]

    def _check_forward_args(self, *args: Any, **kwargs: Any) -> None:
        """As `Mixed`, but for DoRA, which PEFT refuses and we do not."""
        if kwargs.get("adapter_names") is not None:
            kwargs["adapter_names"] = [BASE] * len(kwargs["adapter_names"])
        super()._check_forward_args(*args, **kwargs)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Tensor:
        """y_i = W x_i + s_k (B_k A_k drop_k(x_i) + c_k) with k the adapter of row i; rows without one keep their bits.

        Adapters that are more than LoRA (DoRA and PEFT's other variants) are computed by PEFT, one after another.

        Args:
            x: Inputs, [N, ..., D_in].
            args: For the layer below.
            adapter_names: Adapter of each row; one that this layer does not have adds nothing.
            kwargs: For the layer below, and `alora_offsets`.

        Returns:
            [N, ..., D_out], in the dtype of the layer below.
        """
        offsets = kwargs.pop("alora_offsets", None)
        call = call_of(self.mixed_owner) or MixedCall(adapter_names)
        x = inlet(x)
        output: Tensor = self.base_layer(x, *args, **kwargs)
        rows = call.select([name for name in self.lora_A if name not in self.lora_variant], x)
        changed = output if rows is None else rows.add(output, self._update(rows.take(x), rows), fresh=True)
        for name in self.lora_variant:
            rows = call.select([name], x)
            if rows is not None:
                changed = self._varied(name, x, changed, rows, offsets, kwargs)
        return changed

    def _update(self, x: Tensor, rows: Selection) -> Tensor:
        """What plain LoRA adapters add to their rows."""
        names = rows.slots
        a = stack_padded([_weight(self.lora_A[name]) for name in names], dim=0)
        b = stack_padded([_weight(self.lora_B[name]) for name in names], dim=1)
        scales = [self.scaling[name] for name in names]
        scale = torch.tensor(scales, dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
        kept = dropout_of([_rate(self.lora_dropout[name]) for name in names], rows.index, x.shape)
        x = x.to(a.dtype) if kept is None else x.to(a.dtype) * kept.to(a.dtype)
        update = batched_lora(x, a, b, scale, rows.routing)
        biases = [_bias(self.lora_B[name]) for name in names]
        if all(bias is None for bias in biases):
            return update
        each = torch.stack([b.new_zeros(b.shape[1]) if bias is None else bias for bias in biases])
        added = (each * scale.to(each.dtype)[:, None]).index_select(0, rows.index[:, 0])
        return update + added.view(len(added), *[1] * (update.dim() - 2), -1)

    def _varied(
        self,
        name: str,
        x: Tensor,
        output: Tensor,
        rows: Selection,
        offsets: Sequence[int | None] | None,
        named: dict[str, Any],
    ) -> Tensor:
        """The output with the rows of one adapter as PEFT's variant of LoRA makes them."""
        if offsets is not None and rows.rows is not None:
            offsets = [offsets[row] for row in rows.rows.tolist()]
        varied = self.lora_variant[name].forward(
            self,
            active_adapter=name,
            x=rows.take(x).to(_weight(self.lora_A[name]).dtype),
            result=rows.take(output),
            alora_offsets=offsets,
            **named,
        )
        return rows.put(output, varied)


def _weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight


def _bias(linear: nn.Module) -> Tensor | None:
    bias = linear.bias
    return bias if isinstance(bias, Tensor) else None


def _rate(dropout: nn.Module) -> float:
    """The rate at which PEFT's module drops now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


_MADE: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def mixed_class(theirs: type[nn.Module], ours: type[nn.Module]) -> type[nn.Module]:
    """A class of PEFT's with one of ours before it; of the same name, so that a model prints as before."""
    if (theirs, ours) not in _MADE:
        made = new_class(theirs.__name__, (ours, theirs))
        made.peft_class = theirs  # type: ignore[attr-defined]
        made.__module__ = __name__
        _MADE[theirs, ours] = made
    return _MADE[theirs, ours]


def kind_of(layer: nn.Module) -> type[Mixed] | None:
    """Which class goes before that of a layer; None if it is no layer of PEFT's, or has one already."""
    if isinstance(layer, Mixed):
        return None
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return Mixed
    if not isinstance(layer, LoraLayer):
        return None
    # a class with a mixed batch of its own, as that of quantised layers, keeps it
    ordinary = isinstance(layer, Linear) and type(layer)._mixed_batch_forward is LoraLayer._mixed_batch_forward
    return BatchedLinear if ordinary else MixedLora
