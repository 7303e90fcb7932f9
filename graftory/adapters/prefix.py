"""Prefix tuning: every attention also sees l learned keys and values (Li and Liang 2021, arXiv:2101.00190).

softmax(q [P_k; K]ᵀ) [P_v; V], with P_k, P_v [l, d_k] and [l, d_v] of their own in each layer. They are trained as they
are, without the network of the first paper, as in P-tuning v2 (Liu et al. 2022, arXiv:2110.07602).

The text keeps its positions, P_k gets none, and nothing lies in a cache: a prefix is put in front at every call. (PEFT
and the paper's code put it into the cache, so that the text's positions begin at l; told those positions they give the
same answers.) Encoders, decoders and the self-attentions of encoder-decoders have prefixes; T5's position bias is 0 for
them.

In a mixed batch rows with shorter prefixes, or none, get masked slots: equal to their own run up to rounding; if no row
has a prefix, the base's attention is called as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from graftory.adapters.architectures import linear_widths, matching, module_at, need_architecture
from graftory.adapters.banked_site import BankedSite, Used
from graftory.adapters.method import Method
from graftory.adapters.prefix_attention import Front, unwatch, watch
from graftory.adapters.route import Selection
from graftory.config import PrefixConfig
from graftory.errors import RouteError, UnsupportedAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEYS, VALUES = PrefixConfig.parts


class PrefixSite(BankedSite[PrefixConfig]):
    """Prefixes at one attention: P_k [l, d_k], P_v [l, d_v] of each adapter."""

    padded: ClassVar = {KEYS: 0, VALUES: 0}
    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, path: str, owner: int) -> None:
        super().__init__(model, path, owner)
        object.__setattr__(self, "model", model)
        self.width = attention_width(model, path)

    def install(self, model: PreTrainedModel) -> None:
        """Be asked by the attention; look afterwards whether it did."""
        del model
        watch(self.module, self)
        self.handles.append(self.module.register_forward_hook(self._hook))

    def uninstall(self) -> None:
        """See `Site.uninstall`."""
        super().uninstall()
        unwatch(self.module, self, self.model)

    def shapes(self, config: PrefixConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """[l, d_k], [l, d_v]."""
        del path
        return {KEYS: (config.length, self.width), VALUES: (config.length, self.width)}

    def front(self, batch: Tensor) -> Front | None:
        """See `prefix_attention.Watcher`.

        Raises:
            RouteError: If a row has several prefixes, or one at another weight than 1.
        """
        route = self.route()
        found = [] if route is None else self.selections(route, batch)
        if route is None or not found:
            return None
        route.taps[self._tap] = batch[:0]
        size = max(self.configs[slot].length for _, selection in found for slot in selection.slots)
        keys, values = (batch.new_zeros(len(batch), size, self.width) for _ in range(2))
        lengths = torch.zeros(len(batch), dtype=torch.long, device=batch.device)
        for bank, selection in found:
            twice = len(found) > 1 and bool(selection.take(lengths).any())
            if twice or selection.weights is not None or selection.index.shape[1] > 1:
                raise RouteError(
                    "a row mixes prefixes, or has one at a weight that is not 1; a row takes one prefix adapter, at "
                    "weight 1, beside any others"
                )
            used = self.used(bank, selection)
            front = (part[:, :size] for part in self.vectors(used, selection))
            keys, values = (
                selection.add(whole, _widened(part, size)) for whole, part in zip((keys, values), front, strict=True)
            )
            lengths = selection.add(lengths, used.sizes[used.routing.index[:, 0]].long())
        return Front(keys, values, torch.arange(size, device=batch.device) < lengths[:, None])

    def vectors(self, used: Used, selection: Selection) -> tuple[Tensor, Tensor]:
        """The keys and values of each row of a selection with one adapter each, [E, slots, d_k] and [E, slots, d_v]."""
        del selection
        own = used.routing.index[:, 0]
        return used.tensors[0][own], used.tensors[1][own]

    def queries(self) -> None:
        """See `prefix_attention.Watcher`: all."""

    @property
    def _tap(self) -> str:
        return f"{self.path} {type(self).__name__}"

    def _hook(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del args
        route = self.route()
        if route is None or route.taps.pop(self._tap, None) is not None:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        if self.selections(route, hidden):
            raise RouteError(
                f"{self.path}: the attention was computed without its prefix: the model's attn_implementation was "
                "changed; detach the adapters, change it, and attach them again"
            )


def _widened(part: Tensor, size: int) -> Tensor:
    missing = size - part.shape[1]
    return nn.functional.pad(part, (0, 0, 0, missing)) if missing else part


def attention_width(model: PreTrainedModel, path: str) -> int:
    """How wide the keys of an attention are, all heads together."""
    row = need_architecture(model)
    linears = [(name, module) for name, module in model.named_modules() if name.startswith(f"{path}.")]
    for role, share in (("k", 1), ("qkv", 3)):
        for name, module in linears:
            if any(True for _ in matching([name], row.linears.get(role, ()))):
                return linear_widths(module)[1] // share
    raise UnsupportedAdapterError(f"{path} is no attention of {type(model).__name__}; leave the targets out")


def _resolve(model: PreTrainedModel, config: PrefixConfig) -> tuple[str, ...]:
    """Every self-attention, or those that the targets pick by the end of their path."""
    row = need_architecture(model)
    sites = [path for path, _ in matching((name for name, _ in model.named_modules()), row.attentions)]
    if not config.targets:
        return tuple(sorted(sites))
    unmet = [target for target in config.targets if not any(True for _ in matching(sites, [target]))]
    if unmet:
        raise UnsupportedAdapterError(
            f"target {unmet[0]!r} is no self-attention of {type(model).__name__}; they are {', '.join(sites[:2])}, ..."
        )
    return tuple(sorted(path for path, _ in matching(sites, config.targets)))


def _initial(model: PreTrainedModel, path: str, config: PrefixConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Normal."""
    shape = (config.length, attention_width(model, module_at(model, path)[0]))
    return {part: torch.empty(shape).normal_(0.0, config.spread, generator=generator) for part in (KEYS, VALUES)}


def _site(model: PreTrainedModel, path: str, owner: int, _: PrefixConfig) -> PrefixSite:
    return PrefixSite(model, path, owner)


PREFIX = Method(
    name="prefix",
    title="Prefix tuning",
    paper="Li and Liang 2021, arXiv:2101.00190; Liu et al. 2022, arXiv:2110.07602",
    config=PrefixConfig,
    linear=False,
    site=_site,
    resolve=_resolve,
    initial=_initial,
)
