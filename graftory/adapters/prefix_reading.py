"""Prefixes that depend on what their attention reads: encoders alone can have them, as they see the whole text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graftory.adapters.architectures import matching, need_architecture
from graftory.adapters.prefix import PrefixSite
from graftory.adapters.route import Selection
from graftory.errors import UnsupportedAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ReadingPrefixSite(PrefixSite):
    """A site that keeps what its attention reads until the attention asks for prefixes."""

    def install(self, model: PreTrainedModel) -> None:
        """See `PrefixSite.install`."""
        self.handles.append(self.module.register_forward_pre_hook(self._keep, with_kwargs=True))
        super().install(model)

    def read(self, selection: Selection) -> Tensor:
        """h of the rows of a selection, [E, tokens, d]."""
        route = self.route()
        assert route is not None
        return selection.take(route.taps[self._read_here])

    @property
    def _read_here(self) -> str:
        return f"{self.path} read by {type(self).__name__}"

    def _keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        route = self.route()
        if route is not None:
            route.taps[self._read_here] = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))


def encoder_attentions(model: PreTrainedModel, method: str) -> tuple[str, ...]:
    """Every self-attention of an encoder.

    Raises:
        UnsupportedAdapterError: If the model writes token by token.
    """
    row = need_architecture(model)
    if not (row.last_norms or model.config.model_type == "vit"):
        raise UnsupportedAdapterError(
            f"{type(model).__name__} writes token by token, and the gates of {method} look at whole texts; take lora "
            "or prefix"
        )
    return tuple(sorted(path for path, _ in matching((name for name, _ in model.named_modules()), row.attentions)))
