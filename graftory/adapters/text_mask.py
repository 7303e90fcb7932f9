"""Sites that look at a whole text, and must know which of its tokens are padding."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from graftory.adapters.banked_site import BankedSite
from graftory.config import AdapterConfig
from graftory.errors import RouteError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

C = TypeVar("C", bound=AdapterConfig)
_MASK = "attention mask"


class MaskReading(BankedSite[C]):
    """A site that notes the mask of the batch."""

    def listen_to_mask(self, model: PreTrainedModel) -> None:
        """Note the attention mask whenever the backbone is called."""
        self.handles.append(model.base_model.register_forward_pre_hook(self._read, with_kwargs=True))

    def mask_for(self, tokens: int, method: str) -> Tensor | None:
        """The mask of the batch, [rows, tokens]; None if there is none, and every token counts.

        Args:
            tokens: How many the layer sees.
            method: The adapter's method, for what the errors say.

        Raises:
            RouteError: If it is not known, or is of another length.
        """
        route = self.route()
        mask = route.taps.get(_MASK) if route is not None else None
        if mask is None:
            raise RouteError(
                f"{self.path}: a layer of {method} runs without its model, as under gradient checkpointing; leave "
                "that out"
            )
        if not mask.numel():
            return None
        if mask.shape[1] != tokens:
            raise RouteError(
                f"{self.path}: {tokens} tokens, the mask has {mask.shape[1]}; a batch with soft prompts has no "
                f"rows of {method}"
            )
        known: Tensor = mask
        return known

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        route = self.route()
        if route is not None:
            named = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            mask = named.get("attention_mask")
            route.taps[_MASK] = mask if isinstance(mask, Tensor) and mask.dim() == 2 else torch.empty(0)
