"""Many adapters in one model at once: attach, route, train, extract, detach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftory.adapter import Adapter, AdapterSpec, BaseModel
from graftory.adapters.architectures import module_at
from graftory.adapters.fingerprint import base_of
from graftory.adapters.head import HeadSite
from graftory.adapters.route import Attached, Row, make_route, routed
from graftory.adapters.site import Site
from graftory.adapters.smop import now_readable, reading
from graftory.adapters.table import method_of
from graftory.errors import BaseMismatchError, RouteError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class _Entry:
    """One attached adapter: its slot, and the sites (with its own spelling of the paths) that hold its weights."""

    slot: str
    spec: AdapterSpec
    sources: tuple[Adapter, ...]
    sites: tuple[tuple[str, str], ...] = ()
    heads: tuple[str, ...] = ()


class AdaptedModel(nn.Module):
    """A frozen base model with any number of adapters in it.

    Outside of `route` it is the bare base. The base's modules stay in place and its state dict is unchanged.

    Args:
        model: A transformers model.
        base: Its description; taken from it if not given.
        capacity: Make places for so many adapters at once; more can come, and then places are made anew.
    """

    def __init__(self, model: PreTrainedModel, base: BaseModel | None = None, *, capacity: int = 0) -> None:
        super().__init__()
        if is_adapted(model):
            raise RouteError("adapters are attached to this model already: add() more to those, or detach() them first")
        self.model = model
        self.sites = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self._base = base
        self._capacity = capacity
        self._entries: dict[str, _Entry] = {}
        self._slots = 0
        self._frozen_before = {name: weight.requires_grad for name, weight in model.named_parameters()}
        model.requires_grad_(False)

    @property
    def names(self) -> tuple[str, ...]:
        """The attached adapters."""
        return tuple(self._entries)

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the base model takes and returns, with the adapters of the route in force."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the base model's `generate` takes and returns; beams follow their row's adapter."""
        model: Any = self.model
        named = (kwargs.get(key) for key in ("inputs", "input_ids"))
        asked = next((each for each in (*args[:1], *named) if each is not None), None)
        # what is written must not change the choice of a prompt, whether a cache keeps it or not
        choose_by = asked if now_readable() is None and not self.config.is_encoder_decoder else None
        with reading(now_readable() if choose_by is None else torch.ones_like(choose_by)):
            return model.generate(*args, **kwargs)

    def spec(self, name: str) -> AdapterSpec:
        """The specification of an attached adapter."""
        return self._entry(name).spec

    def add(self, name: str, adapter: Adapter, *, check_base: bool = True) -> None:
        """Attach one more adapter under a name; its weights are copied and start frozen.

        Raises:
            BaseMismatchError: If it was trained on another base, or the model lacks one of its modules.
            ShapeError: If a tensor does not fit.
            RouteError: If the name is taken.
        """
        if name in self._entries:
            raise RouteError(f"an adapter {name!r} is attached already; remove it first or choose another name")
        if check_base:
            self._check_base(name, adapter.spec.base)
        entry = _Entry(f"slot{self._slots}", adapter.spec, adapter.sources)
        self._slots += 1
        try:
            entry = self._put_body(entry, adapter)
            entry = self._put_head(entry, adapter)
        except Exception:
            self._drop(entry.slot)
            raise
        self._entries[name] = entry
        self._parameters_of(entry.slot, requires_grad=False)

    def remove(self, name: str) -> None:
        """Take one adapter out."""
        entry = self._entry(name)
        self._drop(entry.slot)
        del self._entries[name]

    def route(
        self, rows: str | Sequence[Row] | None, heads: str | Sequence[str | None] | None = None
    ) -> AbstractContextManager[None]:
        """Say which adapter each row of the batches inside the `with` uses.

        Args:
            rows: One adapter's name for every row, or a choice per row: a name, None for the bare base, or a
                mixture such as `{"a": 0.7, "b": 0.3}`.
            heads: The adapter whose head a row uses, for all rows or per row; None means the row's own.

        Raises:
            RouteError: If a name is not attached or a row's head is ambiguous.
        """
        known = {name: Attached(entry.slot, bool(entry.heads)) for name, entry in self._entries.items()}
        return routed(id(self), make_route(rows, heads, known))

    def through_heads(self, names: Sequence[str]) -> list[Tensor] | None:
        """Logits of the last forward's rows through the heads of other adapters: the body is not run again.

        To be called inside the route of that forward.

        Returns:
            [rows, outputs] of each; None where the base's head is several modules with something between them, or its
            logits are picked from those of all tokens.

        Raises:
            RouteError: If a name is not attached or has no head, or nothing was run.
        """
        entries = [self._headed(name) for name in names]
        if len(self.heads) != 1:
            return None
        found = [self._head(entry.heads[0]).again(entry.slot) for entry in entries]
        return found if all(logits.dim() == 2 for logits in found) else None

    def replace_head(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Put other weights, by their names in `Adapter.tensors`, in the place of an attached adapter's head; they
        learn if the old ones did, and may have another number of outputs.

        Raises:
            RouteError: If the name is not attached or has no head.
            ShapeError: If a parameter is missing or does not fit.
        """
        entry = self._headed(name)
        for path in entry.heads:
            self._head(path).replace(entry.slot, tensors)

    def train_only(self, *names: str) -> None:
        """Let the weights of these adapters learn and freeze all others."""
        slots = {self._entry(name).slot for name in names}
        for entry in self._entries.values():
            self._parameters_of(entry.slot, requires_grad=entry.slot in slots)

    def weights(self, name: str) -> dict[str, Tensor]:
        """The live weights of an attached adapter but its head's, by their names in `Adapter.tensors`."""
        entry = self._entry(name)
        sites = [(self._site(key), path) for key, path in entry.sites]
        return {name: weight for site, path in sites for name, weight in site.live(entry.slot, path).items()}

    @contextmanager
    def made(self, name: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Let tensors, by their names in `Adapter.tensors`, stand in for the weights of an attached adapter's body.

        Gradients go to whatever made them.
        """
        entry = self._entry(name)
        before = {key: self._site(key).made.get(entry.slot) for key, _ in entry.sites}
        for key, path in entry.sites:
            site = self._site(key)
            own = {part: tensors[f"{path}.{part}"] for part in site.parts(entry.slot)}
            site.made[entry.slot] = site.standing_in(entry.slot, own)
            site.join(entry.slot, self._site(entry.sites[0][0]))
        try:
            yield
        finally:
            for key, was in before.items():
                made = self._site(key).made
                made.pop(entry.slot, None)
                if was is not None:
                    made[entry.slot] = was

    def slot_of(self, name: str) -> str:
        """The slot that sites keep an attached adapter's weights in."""
        return self._entry(name).slot

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [weight for weight in self.parameters() if weight.requires_grad]

    def extract(self, name: str) -> Adapter:
        """An attached adapter as data again, with its present weights."""
        entry = self._entry(name)
        tensors: dict[str, Tensor] = {}
        for key, path in entry.sites:
            tensors |= self._site(key).tensors(entry.slot, path)
        for path in entry.heads:
            tensors |= self._head(path).tensors(entry.slot)
        return Adapter(entry.spec, tensors, entry.sources)

    def detach(self) -> PreTrainedModel:
        """Take everything out and give back the base, bit for bit as it came."""
        for site in self._holders():
            site.uninstall()
        self.sites.clear()
        self.heads.clear()
        self._entries.clear()
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(self._frozen_before[name])
        return self.model

    def _put_body(self, entry: _Entry, adapter: Adapter) -> _Entry:
        method = method_of(adapter.spec.config)
        for path, config in method.places(adapter.spec.config):
            found, _ = module_at(self.model, path)
            site = method.site(self.model, found, id(self), config)
            key = _key(f"{type(site).__name__} {found}")
            if key in self.sites:
                site = self._site(key)
            site.reserve(self._capacity)
            site.put(entry.slot, config, path, adapter)
            if key not in self.sites:
                self.sites[key] = site
                site.install(self.model)
            if entry.sites:
                site.join(entry.slot, self._site(entry.sites[0][0]))
            entry = replace(entry, sites=(*entry.sites, (key, path)))
        return entry

    def _put_head(self, entry: _Entry, adapter: Adapter) -> _Entry:
        for path in adapter.spec.task.head if adapter.spec.task else ():
            if _key(path) not in self.heads:
                module_at(self.model, path)
                self.heads[_key(path)] = HeadSite(self.model, path, id(self))
            self._head(path).reserve(self._capacity)
            self._head(path).put(entry.slot, adapter.tensors)
            entry = replace(entry, heads=(*entry.heads, path))
        return entry

    def _drop(self, slot: str) -> None:
        for holder in (self.sites, self.heads):
            for key, site in list(holder.items()):
                assert isinstance(site, Site | HeadSite)
                if slot in site.weights:
                    site.drop(slot)
                # with a fixed number of places, the next adapter will want them again
                if not site.weights and not self._capacity:
                    site.uninstall()
                    del holder[key]

    def _parameters_of(self, slot: str, *, requires_grad: bool) -> None:
        for site in self._holders():
            if slot in site.weights:
                site.learn(slot, requires_grad)

    def _check_base(self, name: str, wanted: BaseModel) -> None:
        if wanted.config_hash is None and wanted.weights_hash is None:
            return
        if self._base is None:
            self._base = base_of(self.model)
        for what in ("config_hash", "weights_hash"):
            want, got = getattr(wanted, what), getattr(self._base, what)
            if want is not None and want != got:
                kind = what.removesuffix("_hash")
                raise BaseMismatchError(
                    f"adapter {name!r} was trained on {wanted.id} ({kind} {want[:15]}…), this model is "
                    f"{self._base.id} ({kind} {got[:15]}…); pass the right --base"
                )

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise RouteError(f"no adapter {name!r} is attached; attached: {', '.join(self._entries) or 'none'}")
        return self._entries[name]

    def _headed(self, name: str) -> _Entry:
        entry = self._entry(name)
        if not entry.heads:
            raise RouteError(f"{name!r} has no head")
        return entry

    def _holders(self) -> list[Site[Any] | HeadSite]:
        return [site for site in (*self.sites.values(), *self.heads.values()) if isinstance(site, Site | HeadSite)]

    def _site(self, key: str) -> Site[Any]:
        site = self.sites[key]
        assert isinstance(site, Site)
        return site

    def _head(self, path: str) -> HeadSite:
        site = self.heads[_key(path)]
        assert isinstance(site, HeadSite)
        return site


def _key(path: str) -> str:
    """A path as a key of a `ModuleDict`, which holds no dots."""
    return path.replace(".", "/")


def is_adapted(model: nn.Module) -> bool:
    """Whether adapters sit in a model, by the hooks on its modules."""
    tables = (table for each in model.modules() for table in (each._forward_hooks, each._forward_pre_hooks))
    hooks = (hook for table in tables for hook in table.values())
    return any(isinstance(getattr(hook, "__self__", None), Site | HeadSite) for hook in hooks)


def attach(model: PreTrainedModel, adapters: Mapping[str, Adapter], *, check_base: bool = True) -> AdaptedModel:
    """Put adapters into a model; nothing of the model itself changes.

    Args:
        model: A transformers model.
        adapters: Adapters by the names that routes will use.
        check_base: Refuse adapters that were trained on another base, by fingerprint.

    Raises:
        BaseMismatchError: If an adapter was trained on another base, or the model lacks one of its modules.
        ShapeError: If a tensor does not fit the model.
        RouteError: If adapters are attached to it already.
    """
    adapted = AdaptedModel(model)
    try:
        for name, adapter in adapters.items():
            adapted.add(name, adapter, check_base=check_base)
    except Exception:
        adapted.detach()
        raise
    return adapted
