"""The hub of adapters: versions, their bytes, their records, and other hubs to push to and pull from.

The names below are imported when first used: `hub list` needs few of them, and should not wait for the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graftory.hub.diff import Difference
    from graftory.hub.gc import Collected
    from graftory.hub.hub import Hub
    from graftory.hub.index import IndexRow
    from graftory.hub.records import FileEntry, Record, TensorEntry
    from graftory.hub.report import Problem, Report
    from graftory.hub.signing import Signed
    from graftory.hub.transfer import Delivery

_LAZY = {
    "Collected": "gc",
    "Delivery": "transfer",
    "Difference": "diff",
    "FileEntry": "records",
    "Hub": "hub",
    "IndexRow": "index",
    "Problem": "report",
    "Record": "records",
    "Report": "report",
    "Signed": "signing",
    "TensorEntry": "records",
}

__all__ = [
    "Collected",
    "Delivery",
    "Difference",
    "FileEntry",
    "Hub",
    "IndexRow",
    "Problem",
    "Record",
    "Report",
    "Signed",
    "TensorEntry",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(f"graftory.hub.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'graftory.hub' has no attribute {name!r}")
