"""Our mixed batch for a model that PEFT has made: one call gives it, one takes it away again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraModel
from torch import nn

from graftory.adapters.peft_call import BASE, MixedCall, Owner, in_call, recomputed_in_call
from graftory.adapters.peft_layers import Mixed, kind_of, mixed_class
from graftory.errors import RouteError, UnsupportedAdapterError


def mixed_batches(model: PeftModel) -> AbstractContextManager[PeftModel]:
    """Give a PeftModel our mixed batch: `model(**batch, adapter_names=["a", "__base__", "b"])`, in training too.

    The classes of its LoRA layers are swapped for subclasses of them; its weights, state dict and every other use of it
    stay as they are. Rows of `__base__` equal the base bit for bit. Linear layers (GPT-2's Conv1D is one) compute
    all rows in one batched operation; rows of DoRA and of PEFT's other variants of LoRA, embeddings, convolutions,
    quantised layers and `modules_to_save` are computed by PEFT. `generate` may have beams and return several
    sequences. Which adapters learn is PEFT's to say: `model.set_requires_grad(["a", "b"])`. Giving it twice is
    giving it once.

    Args:
        model: A PeftModel with LoRA adapters.

    Returns:
        For `with`: the model, and at the end what it was before. Without `with`, `undo_mixed_batches` undoes it.

    Raises:
        UnsupportedAdapterError: If it is not a PeftModel, or its adapters are not LoRA.
    """
    lora = _lora_model(model)
    given = isinstance(lora, _MixedModel)
    _give(lora)
    return _Given(model, undo=not given)


def undo_mixed_batches(model: PeftModel) -> None:
    """Take our mixed batch from a PeftModel: every layer has its own class again. Without one, nothing is done.

    Raises:
        UnsupportedAdapterError: If it is not a PeftModel, or its adapters are not LoRA.
    """
    for module in _lora_model(model).modules():
        if isinstance(module, Mixed | _MixedModel):
            module.__class__ = module.peft_class  # type: ignore[assignment]
            for name in ("mixed_owner", "mixed_path"):
                vars(module).pop(name, None)


class _Given(AbstractContextManager[PeftModel]):
    """What `mixed_batches` returns."""

    def __init__(self, model: PeftModel, undo: bool) -> None:
        self._model = model
        self._undo = undo

    def __enter__(self) -> PeftModel:
        return self._model

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._undo:
            undo_mixed_batches(self._model)


class _MixedModel(nn.Module):
    """`peft.tuners.lora.LoraModel`, whose calls with `adapter_names` are ours."""

    peft_class: type[nn.Module]
    mixed_owner: Owner

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What a PeftModel enters around every forward and `generate`; it gets their arguments.

        Raises:
            RouteError: If a name is no adapter of the model.
        """
        theirs: Any = super()
        names = kwargs.pop("adapter_names", None)
        if names is None:
            with in_call(self.mixed_owner, None), theirs._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        _give(self)  # an adapter that came later may have brought new layers
        offsets = kwargs.get("alora_offsets")
        call = MixedCall(_checked(names, self), _repeats(self, kwargs), offsets)
        with in_call(self.mixed_owner, call), recomputed_in_call(self, self.mixed_owner, call):
            yield


def _lora_model(model: PeftModel) -> nn.Module:
    """The part of a PeftModel that holds its LoRA layers."""
    lora = model.base_model if isinstance(model, PeftModel) else None
    if type(lora) is not LoraModel and not isinstance(lora, _MixedModel):
        found = type(model).__name__ if lora is None else f"{type(model).__name__} of {type(lora).__name__}"
        raise UnsupportedAdapterError(
            f"got {found}, wanted a PeftModel with LoRA adapters; graftory.attach has mixed batches of other methods"
        )
    assert isinstance(lora, nn.Module)
    return lora


def _give(lora: nn.Module) -> None:
    """Swap every class that is not swapped yet."""
    if not isinstance(lora, _MixedModel):
        lora.__class__ = mixed_class(type(lora), _MixedModel)
        vars(lora)["mixed_owner"] = Owner()
    for path, layer in lora.named_modules():
        kind = kind_of(layer)
        if kind is not None:
            layer.__class__ = mixed_class(type(layer), kind)
            vars(layer).update(mixed_owner=lora.mixed_owner, mixed_path=path)


def _checked(names: Any, lora: Any) -> Sequence[str]:
    """The names, if each is an adapter of the model."""
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
        raise RouteError(f"adapter_names: got {names!r:.80}, wanted a list with a name for each row")
    unknown = sorted(set(names) - {BASE, *lora.peft_config})
    if unknown:
        known = ", ".join((*lora.peft_config, BASE))
        raise RouteError(f"adapter_names: no adapter {', '.join(map(repr, unknown))} in the model; it has {known}")
    return list(names)


def _repeats(lora: Any, asked: dict[str, Any]) -> int:
    """How often `generate` repeats each row: beams, or returned sequences; 1 where nothing is generated."""
    configs = (asked.get("generation_config"), getattr(lora.model, "generation_config", None))

    def value(key: str) -> int:
        values = (asked.get(key), *(getattr(config, key, None) for config in configs))
        return next((each for each in values if each is not None), 1)

    return max(value("num_beams"), value("num_return_sequences"))
