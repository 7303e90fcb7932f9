"""Adapters that sit in a model: one file a method, a table of sites per architecture, attach and detach."""

from graftory.adapters.adapted import AdaptedModel, attach, is_adapted
from graftory.adapters.create import new_adapter
from graftory.adapters.fingerprint import base_of
from graftory.adapters.resident import ResidentAdapters
from graftory.adapters.route import Row
from graftory.adapters.table import METHODS

__all__ = ["METHODS", "AdaptedModel", "ResidentAdapters", "Row", "attach", "base_of", "is_adapted", "new_adapter"]
