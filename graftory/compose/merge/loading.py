"""The base model of adapters whose merge needs its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftory.adapter import Adapter
from graftory.compose.merge import METHODS, needs_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_for(adapters: Sequence[Adapter], method: str) -> PreTrainedModel | None:
    """The base that adapters were trained on, loaded if `merge` asks for it, else None.

    Raises:
        DownloadError: If it cannot be had.
    """
    row = METHODS.get(method)
    if row is None or row.space != "delta" or not needs_base(adapters):
        return None
    from graftory.training import load_base

    spec = adapters[0].spec
    kind = spec.task.kind if spec.task else "classification"
    return load_base(spec.base.id, kind, revision=spec.base.revision).model
