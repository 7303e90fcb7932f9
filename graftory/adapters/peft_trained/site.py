"""One site for all adapters that PEFT computes: each of a batch's rows goes through the layers of its own.

At a module that returns y an adapter's layer returns y_k. A row with one adapter gets y_k itself, one that mixes
adapters y + Σ w (y_k − y). The layers of different adapters run one after the other, each on its own rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftory.adapter import Adapter
from graftory.adapters.architectures import module_at
from graftory.adapters.peft_trained.build import build, load, state
from graftory.adapters.route import Selection
from graftory.adapters.site import Site
from graftory.config.peft import PeftConfig


class PeftSite(Site[PeftConfig]):
    """PEFT's layers of every adapter, at all modules of the model at once."""

    # before every other site, which adds to what is there
    order: ClassVar[int] = -3

    def __init__(self, model: PreTrainedModel, path: str, owner: int) -> None:
        super().__init__(model, path, owner)
        object.__setattr__(self, "model", model)
        self.layers: dict[int, dict[str, nn.Module]] = {}
        """Of each module that an adapter changes, by its identity: PEFT's layer in each slot."""
        self.listening: dict[int, Any] = {}
        self.own: dict[str, dict[str, nn.Parameter]] = {}
        """What of each slot learns, by its name in `Adapter.tensors`."""

    def install(self, model: PreTrainedModel) -> None:
        """Nothing: modules are listened to as adapters come."""
        del model

    def shapes(self, config: PeftConfig, path: str) -> Mapping[str, tuple[int, ...]]:
        """None that we know of: PEFT checks them."""
        del config, path
        return {}

    def put(self, slot: str, config: PeftConfig, path: str, adapter: Adapter) -> None:
        """See `Site.put`."""
        del path
        model = cast(PreTrainedModel, self.model)
        theirs = build(model, config, slot)
        load(theirs, slot, adapter.body_tensors(), config.shared)
        self.own[slot] = _learning(theirs, slot)
        self.weights[slot] = theirs
        self.configs[slot] = config
        for target in config.targets:
            _, module = module_at(model, target)
            self.layers.setdefault(id(module), {})[slot] = theirs.base_model.model.get_submodule(target)
            if id(module) not in self.listening:
                self.listening[id(module)] = self.listen(self._hook, module)

    def drop(self, slot: str) -> None:
        """See `Site.drop`."""
        super().drop(slot)
        del self.own[slot]
        for number, layers in list(self.layers.items()):
            layers.pop(slot, None)
            if not layers:
                del self.layers[number]
                self.listening.pop(number).remove()

    def uninstall(self) -> None:
        """See `Site.uninstall`."""
        super().uninstall()
        self.listening.clear()

    def tensors(self, slot: str, path: str) -> dict[str, Tensor]:
        """See `Site.tensors`."""
        del path
        return {key: value.detach().cpu().clone() for key, value in state(self.weights[slot], slot).items()}

    def live(self, slot: str, path: str) -> dict[str, Tensor]:
        """See `Site.live`: those that learn."""
        del path
        return dict(self.own[slot])

    def learn(self, slot: str, learns: bool) -> None:
        """See `Site.learn`."""
        for weight in self.own[slot].values():
            weight.requires_grad_(learns)

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        route, layers = self.route(), self.layers[id(module)]
        selection = None if route is None else route.select(tuple(layers), output)
        if selection is None:
            return None
        alone = selection.weights is None and selection.index.shape[1] == 1
        changed = output
        for part in selection.apart():
            for number, slot in enumerate(part.slots):
                rows = _rows_of(part, number)
                if rows is None or len(rows):
                    changed = self._through(layers[slot], args, output, changed, rows, None if alone else part, number)
        return changed

    def _through(
        self,
        layer: nn.Module,
        args: tuple[Any, ...],
        output: Tensor,
        changed: Tensor,
        rows: Tensor | None,
        mixed: Selection | None,
        number: int,
    ) -> Tensor:
        """`changed` with what one layer makes of some rows (None: of all) of what the module read."""
        x = args[0] if rows is None else args[0].index_select(0, rows)
        self.show(x)
        made = layer(x, *args[1:]).to(output.dtype)
        if mixed is None:
            return made if rows is None else changed.index_copy(0, rows, made)
        more = made - (output if rows is None else output.index_select(0, rows))
        weights = None if mixed.weights is None else mixed.weights[mixed.index[:, 0] == number, 0]
        if weights is not None:
            more = more * weights.to(more.dtype).view(-1, *[1] * (more.dim() - 1))
        return changed + more if rows is None else changed.index_add(0, rows, more)


def _rows_of(selection: Selection, number: int) -> Tensor | None:
    """The rows of the batch that use one adapter of a selection with one for each row; None: all of them."""
    if selection.rows is None and len(selection.slots) == 1:
        return None
    picked = (selection.index[:, 0] == number).nonzero()[:, 0]
    return picked if selection.rows is None else selection.rows[picked]


def _learning(theirs: Any, slot: str) -> dict[str, nn.Parameter]:
    """What PEFT lets learn, by its name in `Adapter.tensors`."""
    own = {}
    for name, weight in theirs.named_parameters():
        if weight.requires_grad:
            plain = name.replace(f".{slot}", "").removeprefix("base_model.model.").removeprefix("base_model.")
            own[plain] = weight
    return own


def site(model: PreTrainedModel, path: str, owner: int, _: PeftConfig) -> PeftSite:
    """See `Method.site`."""
    return PeftSite(model, path, owner)


def places(config: PeftConfig) -> Iterable[tuple[str, PeftConfig]]:
    """One for the whole adapter: the model."""
    return [("", config)]


def whole(model: PreTrainedModel, config: PeftConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Fresh tensors, drawn by PEFT."""
    seed = int(torch.randint(2**31, (), generator=generator))
    fresh = state(build(model, config, "fresh", seed), "fresh")
    return {key: value.detach().cpu().clone() for key, value in fresh.items()}


def peft_model_of(adapted: nn.Module, name: str) -> Any:
    """PEFT's own model of the layers of an attached adapter."""
    slot = adapted.slot_of(name)  # type: ignore[operator]
    sites: Any = adapted.sites
    return next(one.weights[slot] for one in sites.values() if isinstance(one, PeftSite) and slot in one.weights)
