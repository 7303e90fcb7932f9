"""CoDA: the frozen layer runs on some tokens, a bottleneck beside it on all (Lei et al. 2023, arXiv:2304.04947).

In each layer a router scores the tokens it reads, s = w·x. The k best of a row, k = ⌈share · n⌉ of its n tokens that
are no padding, go through the frozen layer, times λ from the soft top-k of s (`soft_top_k`); all go through the
bottleneck beside the FFN. In post-norm models (BERT and its relatives, DistilBERT), x being what the layer reads:

    h = LN(x + Attention(x)), or with `attention="k_to_all"` LN(x + P(λ ⊙ Attention(q = chosen x, k = v = x)))
    y = LN(h + U act(D h + c) + e + P(λ ⊙ FFN(chosen h)))        P puts 0 where a token is not chosen

In pre-norm ViT the norms stand where they do there; the router reads the normed x, the bottleneck h without its norm.
The bottleneck starts at 0, and w is normal with variance 1/d, so that scores of normed states have about variance 1.
With share 1 a fresh adapter changes nothing; with less it leaves out what the base would do, from the start.

What differs from the paper: it has pre-norm encoders (T5, and others of images and speech) and one bottleneck beside a
whole layer; here each sublayer of a post-norm layer keeps its norm, so that a token that is not chosen still passes
both, and the bottleneck is beside the FFN. The paper goes on with pretraining for a
while with the routers in place, so that the model gets used to them; here nothing but the task's rows trains them, and
a model that few rows must teach to do without most of its attention learns little. So every token attends unless
k-to-all is asked for, the better of the paper's two; k-to-k, where the chosen see each other alone, is left out. T5 is
left out too: generation calls its encoder without the model that is told the mask.

A batch whose rows all choose runs the frozen layers on ⌈share · length⌉ tokens a row. Beside rows of other methods it
runs them on all tokens, and what is not chosen counts 0: rows of others keep their bits, and nothing is saved. A row
takes one such adapter at weight 1; what others beside it in the row change within a frozen layer counts for the tokens
that reach it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from graftory.adapters.architectures import matching, module_at, need_architecture
from graftory.adapters.bank import Bank
from graftory.adapters.bottleneck import BOTTLENECK, residual_width
from graftory.adapters.method import Method
from graftory.adapters.prefix_attention import unwatch, watch
from graftory.adapters.prefix_reading import encoder_attentions
from graftory.adapters.route import Selection
from graftory.adapters.soft_top_k import soft_top_k
from graftory.adapters.text_mask import MaskReading
from graftory.adapters.token_choice import TokenChoice, best_first
from graftory.config import BottleneckConfig, CodaConfig
from graftory.errors import RouteError, UnsupportedAdapterError
from graftory.kernels import batched_bottleneck

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DOWN, DOWN_BIAS, UP, UP_BIAS, ROUTER = CodaConfig.parts

Found = Sequence[tuple[Bank, Selection]]


class CodaSite(MaskReading[CodaConfig]):
    """One layer: a router w [d] and a bottleneck D [size, d], c [size], U [d, size], e [d] of each adapter.

    Its path is that of the linear layer which ends the FFN.
    """

    padded: ClassVar = {DOWN: 0, DOWN_BIAS: 0, UP: 1, UP_BIAS: 0, ROUTER: 0}
    # behind all others: what they change at the same module belongs to the frozen layer
    order: ClassVar[int] = 2
    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, path: str, owner: int) -> None:
        super().__init__(model, path, owner)
        object.__setattr__(self, "model", model)
        self.width = residual_width(model, path)

    def install(self, model: PreTrainedModel) -> None:
        """Choose where the attention begins; narrow queries, what ends the attention, and the FFN."""
        row = need_architecture(model)
        attention = self._of_layer(row.attentions)
        self.listen_to_mask(model)
        self.handles.append(attention.register_forward_pre_hook(self._choose, with_kwargs=True, prepend=True))
        watch(attention, self)
        for module, after in (
            (self._of_layer(row.linears["q"]), self._after_queries),
            (self._of_layer(row.linears["o"]), self._after_attention),
        ):
            self._narrow(module, self._before_attending)
            self.listen(after, module)
        self._narrow(self._of_layer([begin for begin, _ in row.ffns]), self._before_ffn)
        self.listen(self._after_ffn)

    def uninstall(self) -> None:
        """See `Site.uninstall`."""
        super().uninstall()
        unwatch(self._of_layer(need_architecture(self.model).attentions), self, self.model)

    def shapes(self, config: CodaConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """[size, d], [size], [d, size], [d], [d]."""
        del path
        size, width = config.size, self.width
        return {DOWN: (size, width), DOWN_BIAS: (size,), UP: (width, size), UP_BIAS: (width,), ROUTER: (width,)}

    def kind_of(self, config: CodaConfig) -> str:
        """One call has one activation, and narrows the attention or does not."""
        return f"{config.activation} {config.attention}"

    def front(self, batch: Tensor) -> None:
        """See `prefix_attention.Watcher`."""
        del batch

    def queries(self) -> Tensor | None:
        """See `prefix_attention.Watcher`: the chosen tokens."""
        choice = self._choice()
        return choice.index if choice is not None and choice.narrow and self._attends_less() else None

    def _choose(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
        found = self._found(x)
        route = self.route()
        if route is None or not found:
            return
        rows, tokens = x.shape[:2]
        mask = self.mask_for(tokens, CodaConfig.method)
        most = max(
            chosen_of(self.configs[slot].share, tokens)[-1] for _, selection in found for slot in selection.slots
        )
        dtype = torch.promote_types(x.dtype, torch.float32)
        index = torch.arange(most, device=x.device).expand(rows, -1)
        weights = torch.zeros(rows, most, dtype=dtype, device=x.device)
        for bank, selection in found:
            own, counts = self._routed(x, mask, bank, selection, most)
            index, weights = selection.put(index, own), selection.put(weights, counts)
        narrow = most < tokens and sum(len(selection.index) for _, selection in found) == rows
        route.taps[self._tap] = TokenChoice(index, weights, tokens, narrow)

    def _routed(
        self, x: Tensor, mask: Tensor | None, bank: Bank, selection: Selection, most: int
    ) -> tuple[Tensor, Tensor]:
        """Which tokens the rows of a selection choose, best first, and the weight of each, [E, most] both."""
        used = self.used(bank, selection)
        read = selection.take(x)
        scores = torch.einsum("esd,ed->es", read, used.tensors[-1][used.routing.index[:, 0]].to(x.dtype))
        scores = scores.to(torch.promote_types(x.dtype, torch.float32))
        seen = torch.ones_like(scores, dtype=torch.bool) if mask is None else selection.take(mask).bool()
        seen = seen | ~seen.any(1, keepdim=True)
        scores = scores.masked_fill(~seen, -torch.inf)
        configs = [self.configs[slot] for slot in selection.slots]
        own = selection.index[:, 0]
        softness = torch.tensor([each.softness for each in configs], dtype=scores.dtype, device=x.device)[own]
        counts = torch.tensor([chosen_of(each.share, x.shape[1]) for each in configs], device=x.device)
        count = counts[own, seen.sum(1)]
        order = best_first(scores.detach(), most)
        weights = soft_top_k(scores, count, softness).gather(1, order)
        return order, weights * (torch.arange(most, device=x.device) < count[:, None])

    def _before_attending(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        choice = self._choice()
        if choice is None or not choice.narrow or not self._attends_less():
            return None
        return (choice.take(args[0]), *args[1:])

    def _after_queries(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        del args
        choice = self._choice()
        return choice.spread(output) if choice is not None and choice.narrow and self._attends_less() else None

    def _after_attention(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        del args
        choice = self._choice()
        found = () if choice is None else [each for each in self._found(output) if self._less(each[1])]
        return (
            None
            if choice is None or not found
            else _counting(choice, output, found, choice.narrow and self._attends_less())
        )

    def _before_ffn(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        choice, route = self._choice(), self.route()
        if choice is None or route is None:
            return None
        route.taps[self._tap_input] = args[0]
        return (choice.take(args[0]), *args[1:]) if choice.narrow else None

    def _after_ffn(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        del args
        route = self.route()
        choice = route.taps.pop(self._tap, None) if route is not None else None
        if route is None or choice is None:
            return None
        x = route.taps.pop(self._tap_input)
        found = self._found(x)
        changed = _counting(choice, output, found, choice.narrow)
        for bank, selection in found:
            changed = selection.add(changed, self._beside(selection.take(x), bank, selection), fresh=True)
        return changed

    def _beside(self, x: Tensor, bank: Bank, selection: Selection) -> Tensor:
        """U act(D x + c) + e of each row."""
        self.show(x)
        used = self.used(bank, selection)
        down, down_bias, up, up_bias, _ = used.tensors
        return batched_bottleneck(
            x, down, down_bias, up, up_bias, used.scale, used.routing,
            activation=self.configs[selection.slots[0]].activation, sizes=used.sizes,
        )  # fmt: skip

    def _found(self, x: Tensor) -> Found:
        """The rows that choose, by bank.

        Raises:
            RouteError: If a row has several such adapters, or one at another weight than 1.
        """
        route = self.route()
        found = [] if route is None else self.selections(route, x)
        every = torch.arange(len(x), device=x.device)
        rows = [selection.take(every) for _, selection in found] if len(found) > 1 else []
        twice = bool(rows) and sum(map(len, rows)) > len(torch.cat(rows).unique())
        if twice or any(each.weights is not None or each.index.shape[1] > 1 for _, each in found):
            raise RouteError(
                "a row mixes adapters of coda, or has one at a weight that is not 1; a row takes one, at weight 1, "
                "beside any others"
            )
        return found

    def _less(self, selection: Selection) -> bool:
        return self.configs[selection.slots[0]].attention == "k_to_all"

    def _attends_less(self) -> bool:
        """Whether the chosen tokens alone attend, in every row."""
        route = self.route()
        slots = {slot for mixture in route.rows for slot in mixture if slot in self.configs} if route else set()
        return all(self.configs[slot].attention == "k_to_all" for slot in slots)

    def _choice(self) -> TokenChoice | None:
        route = self.route()
        choice: TokenChoice | None = None if route is None else route.taps.get(self._tap)
        return choice

    @property
    def _tap(self) -> str:
        return f"{self.path} chosen"

    @property
    def _tap_input(self) -> str:
        return f"{self.path} read"

    def _narrow(self, module: nn.Module, hook: Any) -> None:
        # ahead of others that keep what the module reads
        self.handles.append(module.register_forward_pre_hook(hook, prepend=True))

    def _of_layer(self, patterns: Sequence[str]) -> nn.Module:
        """The module of this layer that fits one of some patterns."""
        return self.model.get_submodule(next(_of_layer(self.model, self.path, patterns)))


@cache
def chosen_of(share: float, most: int) -> tuple[int, ...]:
    """How many of 0, 1, ..., `most` tokens are chosen: ⌈share · n⌉, and one at least."""
    # share · n may come out a little above the whole number it is
    return tuple(max(1, math.ceil(share * tokens - 1e-9)) for tokens in range(most + 1))


def _counting(choice: TokenChoice, output: Tensor, found: Found, narrow: bool) -> Tensor:
    """What a frozen layer returned, times λ, at its places, with 0 for what was not chosen; other rows as they are."""
    if narrow:
        return choice.spread(choice.weighted(output))
    gates = choice.gates()[..., None].to(output.dtype)
    for _, selection in found:
        output = selection.put(output, selection.take(output) * selection.take(gates))
    return output


def _of_layer(model: PreTrainedModel, path: str, patterns: Sequence[str]) -> Iterator[str]:
    ends = [end for _, end in need_architecture(model).ffns]
    ((_, layer),) = matching([path], ends)
    return (name for name, where in matching((name for name, _ in model.named_modules()), patterns) if where == layer)


def _resolve(model: PreTrainedModel, config: CodaConfig) -> tuple[str, ...]:
    """Where FFNs end: of all layers, or of those that the targets pick by the end of their path."""
    encoder_attentions(model, CodaConfig.method)
    for setting in ("chunk_size_feed_forward", "is_decoder"):
        value = getattr(model.config, setting, None)
        if value:
            raise UnsupportedAdapterError(
                f"coda chooses among all tokens of a text, and the base has {setting}={value!r}; load it without, or "
                "take lora"
            )
    return BOTTLENECK.resolve(model, BottleneckConfig(targets=config.targets, placement="parallel"))


def _initial(model: PreTrainedModel, path: str, config: CodaConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """A bottleneck that adds nothing, and a router with scores of about variance 1."""
    plain = BottleneckConfig(targets=(path,), placement="parallel", size=config.size, activation=config.activation)
    width = residual_width(model, module_at(model, path)[0])
    router = torch.empty(width).normal_(0.0, width**-0.5, generator=generator)
    return {**BOTTLENECK.initial(model, path, plain, generator), ROUTER: router}


def _site(model: PreTrainedModel, path: str, owner: int, _: CodaConfig) -> CodaSite:
    return CodaSite(model, path, owner)


CODA = Method(
    name="coda",
    title="Conditional adapter",
    paper="Lei et al. 2023, arXiv:2304.04947",
    config=CodaConfig,
    linear=False,
    site=_site,
    resolve=_resolve,
    initial=_initial,
)
