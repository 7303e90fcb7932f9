"""Adapters that sit in a model: one file a method, a table of sites per architecture, attach and detach."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftory.lazy import lazily

if TYPE_CHECKING:
    from graftory.adapters.adapted import AdaptedModel, attach, is_adapted
    from graftory.adapters.create import new_adapter
    from graftory.adapters.fingerprint import base_of
    from graftory.adapters.resident import ResidentAdapters
    from graftory.adapters.route import Row
    from graftory.adapters.table import METHODS

__all__ = ["METHODS", "AdaptedModel", "ResidentAdapters", "Row", "attach", "base_of", "is_adapted", "new_adapter"]

__getattr__ = lazily(
    __name__,
    {
        "AdaptedModel": "graftory.adapters.adapted",
        "METHODS": "graftory.adapters.table",
        "ResidentAdapters": "graftory.adapters.resident",
        "Row": "graftory.adapters.route",
        "attach": "graftory.adapters.adapted",
        "base_of": "graftory.adapters.fingerprint",
        "is_adapted": "graftory.adapters.adapted",
        "new_adapter": "graftory.adapters.create",
    },
)
