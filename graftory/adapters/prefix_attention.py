"""An attention that also sees keys and values from elsewhere, or asks for some tokens alone, through transformers' own
registry of attentions.

A model calls the attention that its configuration names. While something is watched here the configuration names ours,
which calls the one that was named before: as it is, unless the module's watcher has something to put in front.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from graftory.errors import UnsupportedAdapterError

_PREFIX = "graftory_prefix_"
_KNOWN = ("sdpa", "eager")


@dataclass(frozen=True, slots=True)
class Front:
    """What stands in front of a batch's own keys and values.

    Attributes:
        keys: [rows, slots, d].
        values: [rows, slots, d].
        used: Which slots hold something, [rows, slots].
    """

    keys: Tensor
    values: Tensor
    used: Tensor


class Watcher(Protocol):
    """Something that puts keys and values in front, or leaves queries out."""

    def front(self, batch: Tensor) -> Front | None:
        """What to put in front of a batch [rows, ...]; None to leave keys and values as they are."""

    def queries(self) -> Tensor | None:
        """The queries that are answered, [rows, K], of which the others get 0; None for all."""


_WATCHERS: WeakKeyDictionary[nn.Module, tuple[Watcher, ...]] = WeakKeyDictionary()


def watch(module: nn.Module, watcher: Watcher) -> None:
    """Let a watcher change what an attention module sees.

    Raises:
        UnsupportedAdapterError: If the model's attention is neither sdpa nor eager.
    """
    config: Any = module.config
    named = config._attn_implementation
    if not named.startswith(_PREFIX):
        if named not in _KNOWN:
            raise UnsupportedAdapterError(
                f"prefixes and coda need an attention of {' or '.join(_KNOWN)}, the base has {named!r}; load it with "
                "attn_implementation='sdpa'"
            )
        config._attn_implementation = _registered(named)
    _WATCHERS[module] = (*_WATCHERS.get(module, ()), watcher)


def unwatch(module: nn.Module, watcher: Watcher, model: nn.Module) -> None:
    """Stop; with the last watched module of a model its configurations name what they named before."""
    left = tuple(each for each in _WATCHERS.pop(module, ()) if each is not watcher)
    if left:
        _WATCHERS[module] = left
    if any(each in _WATCHERS for each in model.modules()):
        return
    for each in (model, *model.modules()):
        config: Any = getattr(each, "config", None)
        named = getattr(config, "_attn_implementation", None) or ""
        if named.startswith(_PREFIX):
            config._attn_implementation = named.removeprefix(_PREFIX)


@cache
def _registered(named: str) -> str:
    """The name of our attention around another; registered once."""
    own = _PREFIX + named
    AttentionInterface.register(own, _around(named))
    AttentionMaskInterface.register(own, ALL_MASK_ATTENTION_FUNCTIONS[named])
    return own


def _around(named: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        default = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        plain: Any = ALL_ATTENTION_FUNCTIONS.get(named, default)
        watchers = _WATCHERS.get(module, ())
        front = _joined([watcher.front(query) for watcher in watchers])
        chosen = next((found for watcher in watchers if (found := watcher.queries()) is not None), None)
        if front is not None:
            attention_mask = _with_slots(_explicit(attention_mask, module, query, key, options), front.used)
            bias = options.get("position_bias")
            if bias is not None:
                options["position_bias"] = functional.pad(bias, (front.used.shape[1], 0))
            key, value = (_in_front(own, more) for own, more in ((key, front.keys), (value, front.values)))
        if chosen is None:
            return plain(module, query, key, value, attention_mask, **options)
        if attention_mask is not None and attention_mask.shape[2] > 1:
            attention_mask = attention_mask.take_along_dim(chosen[:, None, :, None], 2)
        answers, weights = plain(module, _picked(query, chosen), key, value, attention_mask, **options)
        answers = _spread(answers.transpose(1, 2), chosen, query.shape[2]).transpose(1, 2)
        return answers, None if weights is None else _spread(weights, chosen, query.shape[2])

    return attention


def _picked(query: Tensor, chosen: Tensor) -> Tensor:
    """The chosen [rows, K] of the queries [rows, heads, tokens, d]."""
    return query.take_along_dim(chosen[:, None, :, None], 2)


def _spread(answers: Tensor, chosen: Tensor, tokens: int) -> Tensor:
    """[rows, heads, K, ...] at their places in [rows, heads, tokens, ...], with 0 elsewhere."""
    rows, heads, _, width = answers.shape
    whole = answers.new_zeros(rows, heads, tokens, width)
    return whole.scatter(2, chosen[:, None, :, None].expand_as(answers), answers)


def _joined(fronts: Sequence[Front | None]) -> Front | None:
    """What several watchers put in front, one after another."""
    found = [front for front in fronts if front is not None]
    if len(found) < 2:
        return found[0] if found else None
    return Front(*(torch.cat([getattr(front, name) for front in found], dim=1) for name in ("keys", "values", "used")))


def _explicit(mask: Tensor | None, module: nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]) -> Tensor:
    """The mask [rows or 1, heads or 1, queries, keys]; made where the attention would have to infer it."""
    if mask is not None:
        return mask[..., : key.shape[2]]
    length, total = query.shape[2], key.shape[2]
    seen = torch.ones(length, total, dtype=torch.bool, device=query.device)
    causal = options.get("is_causal")
    if getattr(module, "is_causal", True) if causal is None else causal:
        seen = seen.tril(total - length)
    return seen[None, None]


def _with_slots(mask: Tensor, used: Tensor) -> Tensor:
    """The mask with the slots in front, which every query of a row may see."""
    slots = used[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    if mask.dtype != torch.bool:
        hidden = torch.zeros_like(slots, dtype=mask.dtype)
        slots = hidden.masked_fill(~slots, torch.finfo(mask.dtype).min)
    return torch.cat([slots, mask.expand(len(used), -1, -1, -1)], dim=-1)


def _in_front(own: Tensor, more: Tensor) -> Tensor:
    """[rows, heads, keys, d] with [rows, slots, heads d] in front of the keys."""
    rows, heads, _, width = own.shape
    return torch.cat([more.to(own.dtype).view(rows, -1, heads, width).transpose(1, 2), own], dim=2)
