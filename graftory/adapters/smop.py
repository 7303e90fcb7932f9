"""SMoP, sparse mixture-of-prompts (Choi, Kim, Yang, Na and Ko, EMNLP 2023, "SMoP: Towards Efficient and Effective
Prompt Tuning with Sparse Mixture-of-Prompts").

k short prompts P_j [l, d] and a router W [k, d] without bias. With x the mean of a row's frozen input embeddings,

    g = W x,  w = softmax(g),  i = argmax w,  and w_i P_i enters the model with the row,

so a row pays for l soft tokens where one prompt of k l tokens would cost k times as many. While training
g <- g (1 + delta) with delta ~ N(0, noise^2) drawn for every logit; the gradient reaches W through w_i alone, and there
is no loss that balances the load. W starts orthogonal, P normal.

Every row is routed by itself. (The paper's code adds the prompts of a whole batch up, by a broadcast; here a batch of
one gives what a batch of many gives.)

Where the prompt stands: the paper's T5 has it in front, and so have decoders and encoder-decoders here. In the family
of BERT it stands behind [CLS], at position 1, because poolers and heads read position 0. Position ids count it; mask
and segments are extended; what is returned is cut back to the text (logits, last and all hidden states), so labels
stay aligned. Attention maps keep the soft tokens, and so does the encoder's output of an encoder-decoder, which its
decoder attends to. In a decoder the prompt enters with the first forward and then lies in the cache.

In a mixed batch the rows without a prompt get masked slots, and are what they are alone up to rounding; if no row has
a prompt the model is called as it is.

A decoder must not choose a prompt by the tokens that it is about to predict: they would be seen through the choice.
Training, evaluation and `generate` say with `reading` which tokens may be read; whoever calls a model on text alone
need not.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftory.adapters.architectures import module_at
from graftory.adapters.method import Method
from graftory.adapters.prompt_inputs import Counting, Slots, going_on, longer, mask_of
from graftory.adapters.prompt_places import embedding_path, position_limit, prompt_place, stacks_of
from graftory.adapters.route import Selection
from graftory.adapters.site import Site
from graftory.config import PromptConfig, SmopConfig
from graftory.errors import RouteError, UnsupportedAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS, ROUTER = "smop_prompts", "smop_router.weight"


class RoutingWatcher(Protocol):
    """Something that is shown how rows are routed."""

    def __call__(self, owner: int, slot: str, rows: Tensor, weights: Tensor, /) -> None:
        """Take w [entries, k]; entry i is row `rows[i]` of the batch."""


_WATCHER: ContextVar[RoutingWatcher | None] = ContextVar("graftory_routing", default=None)
_READABLE: ContextVar[Tensor | None] = ContextVar("graftory_readable", default=None)


@contextmanager
def routing_watched(watcher: RoutingWatcher) -> Iterator[None]:
    """Show a watcher the routing that happens inside the `with`, in this thread."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def now_readable() -> Tensor | None:
    """What `reading` says at present."""
    return _READABLE.get()


@contextmanager
def reading(tokens: Tensor | None) -> Iterator[None]:
    """Let routers inside the `with` read only these tokens, [rows, length]; None: all that are no padding.

    Tokens behind them, as they come while writing, are not read; rows may come repeated in place, as beams do.
    """
    token = _READABLE.set(tokens)
    try:
        yield
    finally:
        _READABLE.reset(token)


def mean_embedding(embedded: Tensor, mask: Tensor) -> Tensor:
    """x = sum of m_t e_t / sum of m_t for embeddings [rows, tokens, d]; 0 for a row without tokens. In fp32 or more."""
    weights = mask.to(torch.promote_types(embedded.dtype, torch.float32))
    total = torch.einsum("rt,rtd->rd", weights, embedded.to(weights.dtype))
    return total / weights.sum(1, keepdim=True).clamp(min=1)


def route_prompts(x: Tensor, prompts: Tensor, router: Tensor | None, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """The prompt of each row, and how it was chosen.

    Args:
        x: Mean embeddings, [rows, d].
        prompts: P, [k, l, d].
        router: W, [k, d]; None where there is but one prompt.
        noise: Standard deviation of delta.

    Returns:
        w_i P_i [rows, l, d], and w [rows, k].
    """
    if router is None:
        return prompts.expand(len(x), -1, -1), prompts.new_ones(len(x), 1)
    logits = x.to(router.dtype) @ router.T
    if noise:
        logits = logits * (1 + noise * torch.randn_like(logits)).detach()
    weights = logits.softmax(-1)
    best = weights.argmax(-1, keepdim=True)
    return weights.gather(1, best)[..., None] * prompts[best[:, 0]], weights


class PromptSite(Site[SmopConfig | PromptConfig]):
    """The prompts of all adapters, at the input embeddings; the hooks are on what takes the embedded input."""

    stack: nn.Module
    decoder: nn.Module | None

    def __init__(self, model: PreTrainedModel, path: str, owner: int) -> None:
        super().__init__(model, path, owner)
        stack, decoder = stacks_of(model)
        object.__setattr__(self, "stack", stack)
        object.__setattr__(self, "decoder", decoder)
        self.place = prompt_place(model)
        padding = int(getattr(model.config, "pad_token_id", 0) or 0) if self.place.positions == "offset" else 0
        self.counting = Counting(self.place.positions, padding, position_limit(model))
        self.names = [*inspect.signature(stack.forward).parameters]
        self.decoder_names = [*inspect.signature(decoder.forward).parameters] if decoder else []
        # a cache that has taken up prompts, and how many slots they have in it
        self.caches: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def install(self, model: PreTrainedModel) -> None:
        """Make the stack's input longer and cut its output."""
        del model
        self.handles.append(self.stack.register_forward_pre_hook(self._enter, with_kwargs=True))
        self.handles.append(self.stack.register_forward_hook(self._leave))
        if self.decoder is not None:
            self.handles.append(self.decoder.register_forward_pre_hook(self._widen, with_kwargs=True))

    def shapes(self, config: SmopConfig | PromptConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """[k, l, d] and, with more than one prompt, [k, d]."""
        del path
        width = embedding_width(self.module)
        return {part: (*shape[:-1], width) for part, shape in config.shapes().items()}

    def parts(self, slot: str) -> Sequence[str]:
        """See `Site.parts`."""
        return tuple(self.configs[slot].shapes())

    def _slots(self, selection: Selection, batch: Tensor) -> Slots:
        """The slots of a batch whose rows use these adapters.

        Raises:
            RouteError: If a row has several prompts, or one at another weight than 1.
        """
        sizes = torch.tensor([self.configs[slot].length for slot in selection.slots], device=batch.device)
        rows = _rows(selection)
        if selection.weights is not None or selection.index.shape[1] > 1:
            raise RouteError(
                "a row mixes prompts, or has one at a weight that is not 1; a row takes one smop adapter, at weight 1, "
                "beside any others"
            )
        lengths = torch.zeros(len(batch), dtype=torch.long, device=batch.device).index_copy(
            0, rows, sizes[selection.index[:, 0]]
        )
        return Slots(lengths, max(self.configs[slot].length for slot in selection.slots), self.place.at)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        route = self.route()
        if route is None:
            return None
        route.taps.pop(self._tap, None)
        values = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tokens = values.get("input_ids") if values.get("inputs_embeds") is None else values["inputs_embeds"]
        selection = None if tokens is None else route.select(tuple(self.configs), tokens)
        if tokens is None or selection is None:
            return None
        slots = self._slots(selection, tokens)
        cache = values.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise UnsupportedAdapterError(
                "a static cache has no room for prompts; generate with the default cache, which grows"
            )
        past = int(cache.get_seq_length()) if cache is not None else 0
        if past:
            if self.caches.get(cache) != slots.size:
                raise RouteError("the cache was filled without this route's prompts; start again with an empty one")
            going_on(values, tokens, past, slots, self.counting)
            return (), values
        embedded = self.module(tokens) if tokens.dim() == 2 else tokens
        prompts = self._prompts(selection, embedded, mask_of(values, embedded), slots)
        longer(values, embedded, prompts, slots, self.counting)
        route.taps[self._tap] = slots.used()
        return (), values

    @property
    def _tap(self) -> str:
        return f"{self.path} prompts"

    def _prompts(self, selection: Selection, embedded: Tensor, mask: Tensor, slots: Slots) -> Tensor:
        """What fills the slots, [rows, size, d]."""
        rows, readable, watcher = _rows(selection), now_readable(), _WATCHER.get()
        if readable is not None:
            mask = mask * _fitting(readable, mask)
        means = mean_embedding(embedded.detach(), mask)
        filled = embedded.new_zeros(len(embedded), slots.size, embedded.shape[-1])
        for number, slot in enumerate(selection.slots):
            mine, config = rows[selection.index[:, 0] == number], self.configs[slot]
            router = self.get(slot, ROUTER) if config.prompts > 1 else None
            # the base's mode counts too: one that was in evaluation mode when it was adapted is meant to stay so
            noise = config.noise if self.training and self.stack.training else 0.0
            chosen, weights = route_prompts(means[mine], self.get(slot, PROMPTS), router, noise)
            empty = chosen.new_zeros(len(mine), slots.size - config.length, chosen.shape[-1])
            filled = filled.index_copy(0, mine, torch.cat([empty, chosen], dim=1).to(filled.dtype))
            if watcher is not None:
                watcher(self.owner, slot, mine, weights.detach())
        return filled

    def _leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        del args
        route = self.route()
        used = route.taps.pop(self._tap, None) if route else None
        if used is None:
            return None
        slots = Slots(used.sum(1), used.shape[1], self.place.at)
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self.caches[cache] = slots.size
        if self.decoder is not None:
            return None  # the decoder attends to the prompt too
        hidden = output[0]
        if isinstance(output, tuple):
            return slots.cut(output, hidden.shape[1])
        for name, value in list(output.items()):
            output[name] = slots.cut(value, hidden.shape[1])
        return output

    def _widen(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let a decoder attend to the prompts in the encoder's output, and to no masked slot."""
        route = self.route()
        values = {**dict(zip(self.decoder_names, args, strict=False)), **kwargs}
        states, mask = values.get("encoder_hidden_states"), values.get("encoder_attention_mask")
        selection = None if route is None or states is None else route.select(tuple(self.configs), states)
        if selection is None or states is None:
            return None
        slots = self._slots(selection, states)
        if mask is None:
            mask = torch.ones(len(states), states.shape[1] - slots.size, dtype=torch.long, device=states.device)
        if mask.dim() != 2 or mask.shape[1] + slots.size != states.shape[1]:
            raise RouteError("the encoder's output was made without this route's prompts; run the encoder again")
        values["encoder_attention_mask"] = slots.insert(mask, slots.used())
        return (), values


def _fitting(readable: Tensor, mask: Tensor) -> Tensor:
    """What may be read of rows that were repeated in place and went on growing."""
    rows = readable.to(mask.device, mask.dtype).repeat_interleave(len(mask) // len(readable), dim=0)
    return functional.pad(rows, (0, mask.shape[1] - rows.shape[1]))


def _rows(selection: Selection) -> Tensor:
    if selection.rows is not None:
        return selection.rows
    return torch.arange(len(selection.index), device=selection.index.device)


def embedding_width(module: nn.Module) -> int:
    """Numbers of one embedding."""
    assert isinstance(module, nn.Embedding)
    return module.embedding_dim


def smop_config(model: PreTrainedModel, config: SmopConfig) -> SmopConfig:
    """A configuration with what it takes from the model: where prompts enter, and how wide they are there.

    Raises:
        UnsupportedAdapterError: If prompts cannot enter this architecture.
    """
    path = config.targets[0] if config.targets else embedding_path(model)
    return replace(config, targets=(path,), width=embedding_width(module_at(model, path)[1]))


def _resolve(model: PreTrainedModel, config: SmopConfig) -> tuple[str, ...]:
    prompt_place(model)
    if not config.width:
        raise UnsupportedAdapterError("a smop adapter takes its width from the base: see hub compose smop")
    return config.targets


def _initial(model: PreTrainedModel, path: str, config: SmopConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """P normal, W orthogonal."""
    del model, path
    tensors: dict[str, Tensor] = {}
    for part, shape in config.shapes().items():
        empty = torch.empty(shape)
        if part == ROUTER:
            nn.init.orthogonal_(empty, generator=generator)
        else:
            empty.normal_(0.0, config.spread, generator=generator)
        tensors[part] = empty
    return tensors


def _site(model: PreTrainedModel, path: str, owner: int, _: SmopConfig) -> PromptSite:
    return PromptSite(model, path, owner)


SMOP = Method(
    name="smop",
    title="SMoP",
    paper="Choi et al., EMNLP 2023",
    config=SmopConfig,
    linear=False,
    site=_site,
    resolve=_resolve,
    initial=_initial,
)
